"""FullGrad: the parts of the score that come from the pixels and from the biases of all layers.

Shape suffixes: B batch, C channels of the input or of a layer, H W the network's input, K classes, h w a layer's grid.
"""

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.methods.base import Each, Method, safe_divide
from saltern.pipeline.methods.functions import (
    CLAMPS,
    OTHER_ACTIVATIONS,
    RECTIFIERS,
    activation_name,
    bounds,
    functions,
)
from saltern.pipeline.methods.gradients.gradient import pixel_gradients
from saltern.pipeline.models.halves import full_of
from saltern.pipeline.models.interception import Interception, Swap, check_visible
from saltern.pipeline.models.passes import full_precision, logits_of
from saltern.pipeline.models.probe import probe
from saltern.schemas.errors import UserError

_LINEAR = functions("leaky_relu leaky_relu_ prelu")  # piecewise linear without a bias
_BENT = functions("layer_norm group_norm instance_norm local_response_norm softmax sigmoid sigmoid_ tanh tanh_") | {
    F.scaled_dot_product_attention
}
_AXES = {"channel": (2, 3), "layer": (1, 2, 3)}


class FullGrad(Method):
    """Input times gradient, plus bias times gradient of every layer with a grid, without signs (Srinivas 2019, eq. 5).

    In a network of ReLUs the logit is exactly the signed sum of these parts and of the biases of the layers without a
    grid, which no map can show. BatchNorm in eval mode has the bias b - mean * w / std, and a ReLU6 the bias 6 where it
    saturates. Each part is enlarged bilinearly (align_corners False), and all are summed.
    """

    name = "fullgrad"
    cost = "1 forward, 1 backward"
    comparable = True
    heavy_tailed = True
    default_map_dtype = "uint8"

    rescale: Annotated[
        Literal["none", "channel", "layer"], "What is scaled to 0..1 first: nothing, each channel, or all of a layer."
    ] = "none"

    def prepare(self) -> None:
        check_visible(self.model, self.title())
        try:
            with torch.no_grad(), Interception(self._parts().swaps()):
                self.model(probe(self.model, self.input_side))
        except (RuntimeError, ValueError, TypeError, AssertionError):
            pass  # a model for images of another shape is checked on its first batch

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        parts = self._parts()
        with Interception(parts.swaps()):
            logits_BK = logits_of(self.model(x_BCHW.requires_grad_()))
        scores, maps = self.scores(logits_BK, target_B, number), []
        for gradient_BCHW in pixel_gradients(logits_BK, scores, x_BCHW):
            with full_precision(x_BCHW.device), torch.no_grad():
                parts.add(x_BCHW, gradient_BCHW)
                maps.append(parts.map_of((x_BCHW.shape[2], x_BCHW.shape[3])))
        return maps, logits_BK, scores

    def _parts(self) -> "_Parts":
        return _Parts(self.rescale, f"{self.title()} explains networks of ReLUs, and {type(self.model).__name__} has")


class _Parts:
    """Sums of the parts of one backward pass, by grid. A layer's gradient is released as soon as it is added.

    Args:
        rescale: as the option of FullGrad.
        refusal: begin of the message about an operation that is not piecewise linear.
    """

    def __init__(self, rescale: str, refusal: str) -> None:
        self._rescale, self._refusal = rescale, refusal
        self._sums: dict[tuple[int, ...], Tensor] = {}

    def add(self, bias: Tensor, gradient_BChw: Tensor) -> None:
        """Add the part of one layer. The bias can be broadcast to its gradient."""
        part_BChw = (gradient_BChw.float() * bias.float()).abs_()
        if axes := _AXES.get(self._rescale):
            low, high = part_BChw.amin(axes, keepdim=True), part_BChw.amax(axes, keepdim=True)
            part_BChw = safe_divide(part_BChw - low, high - low)
        grid = tuple(part_BChw.shape[2:])
        part_Bhw = part_BChw.sum(1)
        self._sums[grid] = self._sums[grid] + part_Bhw if grid in self._sums else part_Bhw

    def map_of(self, size: tuple[int, int]) -> Tensor:
        """Return map_BHW of the parts, and forget them."""
        enlarged = [F.interpolate(sum_Bhw[:, None], size, mode="bilinear")[:, 0] for sum_Bhw in self._sums.values()]
        self._sums = {}
        return torch.stack(enlarged).sum(0)

    def swaps(self) -> dict[Any, Swap]:
        """Return the functions that show the biases of a forward pass, and those that refuse it."""
        refused = (OTHER_ACTIVATIONS - _LINEAR) | _BENT
        clamped = {function: self._clamping(function) for function in RECTIFIERS | CLAMPS}
        return {
            **{function: self._refusing(function) for function in refused},
            **clamped,
            torch.conv2d: self._convolution,
            F.batch_norm: self._batch_norm,
        }

    def _watched(self, out: Tensor, bias: Tensor) -> Tensor:
        if out.requires_grad and out.ndim == 4:
            out.register_hook(lambda gradient_BChw: self.add(bias, gradient_BChw))  # type: ignore[no-untyped-call]
        return out

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **more: Any
    ) -> Tensor:
        out = torch.conv2d(input, weight, bias, *args, **more)
        return out if bias is None or out.ndim != 4 else self._watched(out, full_of(bias)[:, None, None])

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if training or running_mean is None or running_var is None:
            raise UserError(f"{self._refusal} BatchNorm with the statistics of each batch; use gradient")
        scale = (running_var.float() + eps).rsqrt() * (1 if weight is None else full_of(weight).float())
        shift = -running_mean.float() * scale + (0 if bias is None else full_of(bias).float())
        return self._watched(out, shift[:, None, None])

    def _clamping(self, function: Any) -> Swap:
        def clamped(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            low, high = bounds(function, args, kwargs)
            out = function(input, *args, **kwargs)
            for bound, reached in ((low, torch.le), (high, torch.ge)):
                if isinstance(bound, int | float) and 0 < abs(bound) < math.inf:
                    self._watched(out, reached(out.detach(), bound) * bound)
            return out

        return clamped

    def _refusing(self, function: Any) -> Swap:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            name = activation_name(function) if function in OTHER_ACTIVATIONS else function.__name__
            raise UserError(f"{self._refusal} {name}; use gradient")

        return refuse
