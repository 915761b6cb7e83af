"""The gradient family: the logit's derivative by the input's pixels.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from typing import Literal

from torch import Tensor

from saltern.pipeline.methods.base import Maps, Method, register
from saltern.pipeline.models.passes import logits_of, pick_target, score_gradients
from saltern.schemas.errors import UserError


@register("gradient")
class Gradient(Method):
    """Gradient of the logit by the pixels; its largest magnitude over the channels (Simonyan 2014, section 3.1).

    Options:
        value: of each pixel and channel, first: square, abs or signed (as it is).
        reduce: over the channels, then: max, sum or l2 (root of the sum of squares).
    """

    heavy_tailed = True
    default_map_dtype = "uint8"

    reduce: Literal["max", "sum", "l2"] = "max"
    value: Literal["square", "abs", "signed"] = "abs"

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        logits_BK = self.forward(x_BCHW.requires_grad_())
        target_B = pick_target(logits_BK, target_B)
        values_BCHW = self.weighed(pixel_gradient(logits_BK, target_B, x_BCHW).float(), x_BCHW.detach())
        return self.reduced(values_BCHW), logits_BK, target_B

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """logits_BK, ready to be differentiated."""
        return logits_of(self.model(x_BCHW))

    def weighed(self, gradient_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Signed float32 values of every channel, from the float32 gradient: here the gradient itself."""
        return gradient_BCHW

    def reduced(self, values_BCHW: Tensor) -> Tensor:
        """map_BHW from signed float32 values of every channel."""
        if self.value != "signed":
            values_BCHW = values_BCHW.square() if self.value == "square" else values_BCHW.abs()
        if self.reduce == "l2":
            return values_BCHW.square().sum(1).sqrt()
        return values_BCHW.amax(1) if self.reduce == "max" else values_BCHW.sum(1)


@register("input-x-gradient")
class InputXGradient(Gradient):
    """Each pixel times the gradient of the logit by it, summed over the channels; signed (Shrikumar 2016).

    Options:
        value, reduce: as of `gradient`, of the products.
    """

    default_map_dtype = "float16"  # signed: a uint8 scale would have to span both tails

    reduce: Literal["max", "sum", "l2"] = "sum"
    value: Literal["square", "abs", "signed"] = "signed"

    def weighed(self, gradient_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        return gradient_BCHW * x_BCHW


def pixel_gradient(logits_BK: Tensor, target_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """dz_c/dx of every sample, in the dtype of x. Raises UserError where the model cuts the gradient."""
    (gradient_BCHW,) = score_gradients(logits_BK, target_B, [x_BCHW])
    if gradient_BCHW is None:
        raise UserError("the logits do not depend on the pixels: the model cuts the gradient")
    return gradient_BCHW
