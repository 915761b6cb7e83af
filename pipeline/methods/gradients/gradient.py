"""The gradient of the logit with respect to the pixels.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from torch import Tensor

from saltern.pipeline.methods.base import Each, Method
from saltern.pipeline.models.passes import Score, gradients_of_each, logits_of
from saltern.schemas.errors import UserError

Reduce = Annotated[Literal["max", "sum", "l2"], "How the channels are combined; l2 = root of the sum of squares."]
Value = Annotated[Literal["square", "abs", "signed"], "What is taken of each pixel and channel before that."]


class Gradient(Method):
    """Gradient of the logit by the pixels; its largest magnitude over the channels (Simonyan 2014, section 3.1)."""

    name = "gradient"
    cost = "1 forward, 1 backward"
    comparable = True
    heavy_tailed = True
    default_map_dtype = "uint8"

    reduce: Reduce = "max"
    value: Value = "abs"

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        logits_BK = self.forward(x_BCHW.requires_grad_())
        scores = self.scores(logits_BK, target_B, number)
        each = pixel_gradients(logits_BK, scores, x_BCHW)
        maps = [self.reduced(self.weighed(gradient.float(), x_BCHW.detach())) for gradient in each]
        return maps, logits_BK, scores

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits_BK that can be differentiated."""
        return logits_of(self.model(x_BCHW))

    def weighed(self, gradient_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Return signed float32 values of every channel from the float32 gradient; here the gradient itself."""
        return gradient_BCHW

    def reduced(self, values_BCHW: Tensor) -> Tensor:
        """Return map_BHW from signed float32 values of every channel."""
        if self.value != "signed":
            values_BCHW = values_BCHW.square() if self.value == "square" else values_BCHW.abs()
        if self.reduce == "l2":
            return values_BCHW.square().sum(1).sqrt()
        return values_BCHW.amax(1) if self.reduce == "max" else values_BCHW.sum(1)


class InputXGradient(Gradient):
    """Each pixel times the gradient of the logit by it, summed over the channels; signed (Shrikumar 2016)."""

    name = "input-x-gradient"
    default_map_dtype = "float16"  # signed: a uint8 scale would have to span both tails

    reduce: Reduce = "sum"
    value: Value = "signed"

    def weighed(self, gradient_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        return gradient_BCHW * x_BCHW


def pixel_gradients(logits_BK: Tensor, scores: Sequence[Score], x_BCHW: Tensor) -> Iterator[Tensor]:
    """Yield ds/dx of every sample for each of the scores, in the dtype of x.

    Raises:
        UserError: the model cuts the gradient.
    """
    for (gradient_BCHW,) in gradients_of_each(logits_BK, scores, [x_BCHW]):
        if gradient_BCHW is None:
            raise UserError("the logits do not depend on the pixels: the model cuts the gradient")
        yield gradient_BCHW
