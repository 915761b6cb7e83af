"""The gradient family: the logit's derivative by the input's pixels.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from typing import Literal

from torch import Tensor

from pipeline.methods.base import Maps, Method, register
from pipeline.methods.scores import logits_of, pick_target, score_gradients
from schemas.errors import UserError


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
        logits_BK = logits_of(self.model(x_BCHW.requires_grad_()))
        target_B = pick_target(logits_BK, target_B)
        (gradient_BCHW,) = score_gradients(logits_BK, target_B, [x_BCHW])
        if gradient_BCHW is None:
            raise UserError("the logits do not depend on the pixels: the model cuts the gradient")
        return self.reduced(gradient_BCHW.float()), logits_BK, target_B

    def reduced(self, gradient_BCHW: Tensor) -> Tensor:
        """map_BHW from signed float32 values of every channel."""
        if self.value != "signed":
            gradient_BCHW = gradient_BCHW.square() if self.value == "square" else gradient_BCHW.abs()
        if self.reduce == "l2":
            return gradient_BCHW.square().sum(1).sqrt()
        return gradient_BCHW.amax(1) if self.reduce == "max" else gradient_BCHW.sum(1)
