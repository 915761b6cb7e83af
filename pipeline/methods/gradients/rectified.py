"""Gradients whose backward pass follows another rule at each rectifier: deconvnet, guided backpropagation.

Shape suffixes: B batch, C H W the network's input, K channels of a layer (classes of logits), h w its grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saltern.pipeline.methods.base import Maps, weighted_sum
from saltern.pipeline.methods.gradients.gradient import Gradient, pixel_gradient
from saltern.pipeline.models.interception import Interception, Swap, check_visible
from saltern.pipeline.models.layers import probe
from saltern.pipeline.models.passes import full_precision, pick_target
from saltern.pipeline.models.taps import Taps
from saltern.schemas.errors import UserError

Found = TypeVar("Found")


@dataclass
class Rule:
    """What becomes of the backward signal R at a rectifier with output h; may change between two backward passes."""

    masked: bool  # R * [0 < h < high], as the true gradient has it
    clipped: bool  # R * [R > 0]
    met: bool = False  # a rectifier ran


class Rectify(torch.autograd.Function):
    """x clamped to 0 <= x <= high, whose backward pass follows a rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, inplace: bool, rule: Rule) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            h = x.relu_() if high == math.inf else x.clamp_(0, high)
        else:
            h = x.relu() if high == math.inf else x.clamp(0, high)
        ctx.high, ctx.rule = high, rule
        if rule.masked:
            ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> Any:
        (R,) = signal
        if not ctx.rule.masked:
            return R.relu(), None, None, None
        (h,) = ctx.saved_tensors
        if ctx.high == math.inf:
            R = torch.ops.aten.threshold_backward(R, h, 0)
        else:
            R = torch.ops.aten.hardtanh_backward(R, h, 0, ctx.high)
        return R.relu_() if ctx.rule.clipped else R, None, None, None


class Rectified(Gradient):
    """Base of the gradients with a rule at every rectifier: ReLU, ReLU6, and clamping from 0 on."""

    _masked = True
    _clipped = True

    def prepare(self) -> None:
        check_visible(self.model, self.title())
        self._rule = Rule(self._masked, self._clipped)
        self._swaps = _swaps(self._rule, f"{self.title()} changes the backward pass of rectifiers (ReLU, ReLU6)")
        try:
            with torch.no_grad():
                self.forward(probe(self.model))
        except (RuntimeError, ValueError, TypeError, AssertionError):
            pass  # a model for images of another shape: its first batch tells

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._swapped(lambda: super(Rectified, self).forward(x_BCHW))

    def _swapped(self, run: Callable[[], Found]) -> Found:
        """A forward pass under the rule. Raises UserError on another activation, or none."""
        self._rule.met = False
        with Interception(self._swaps):
            found = run()
        if not self._rule.met:
            raise UserError(
                f"{self.title()} changes the backward pass of rectifiers, and {type(self.model).__name__} has none; "
                "use gradient"
            )
        return found


class Deconvnet(Rectified):
    """Gradient that passes each ReLU where the backward signal is positive (Zeiler 2014, section 2.1).

    The map depends on the image only through the max poolings: in a network without any, every image has the same map
    (Springenberg 2015).
    """

    name = "deconvnet"

    _masked = False


class GuidedBackprop(Rectified):
    """Gradient that passes each ReLU where its output and the backward signal are positive (Springenberg 2015).

    A ReLU6 passes the signal only where its output is also below 6.
    """

    name = "guided-backprop"


class GuidedGradCAM(Rectified):
    """Guided backpropagation times the upsampled Grad-CAM of one layer (Selvaraju 2017, section 3.2).

    Grad-CAM uses the true gradient and is upsampled bilinearly (align_corners False).
    """

    name = "guided-grad-cam"
    cost = "1 forward, 1 backward, and 1 down to the layer"
    layered = True

    def prepare(self) -> None:
        self._taps = Taps(self.model, self.layer)
        super().prepare()

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        self._rule.clipped = True
        x_BCHW.requires_grad_()
        logits_BK, outputs = self._swapped(lambda: self._taps.forward(x_BCHW, differentiable=True))
        target_B = pick_target(logits_BK, target_B)
        cam_BHW = self._cam(logits_BK, target_B, outputs[0], x_BCHW)
        self._rule.clipped = True
        guided_BCHW = pixel_gradient(logits_BK, target_B, x_BCHW).float()
        return self.reduced(guided_BCHW * cam_BHW[:, None]), logits_BK, target_B

    def _cam(self, logits_BK: Tensor, target_B: Tensor, output: Tensor, x_BCHW: Tensor) -> Tensor:
        self._rule.clipped = False  # the same graph serves both backward passes
        score = logits_BK.float().gather(1, target_B[:, None]).sum()
        with full_precision(x_BCHW.device):
            (gradient,) = torch.autograd.grad(score, [output], retain_graph=True, allow_unused=True)
            if gradient is None:
                raise UserError(f"the logits do not depend on layer {self.layer[0]!r}; choose another")
            size = x_BCHW.shape[2:]
            A_BKhw, G_BKhw = self._taps.grid(0, output, size), self._taps.grid(0, gradient, size)
            cam_Bhw = weighted_sum(G_BKhw.mean((2, 3)), A_BKhw).relu()
            return F.interpolate(cam_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


# What a call means: (x, high, inplace), or None where it is no rectifier.
Call = tuple[Tensor, float, bool] | None


def _relu(input: Tensor, inplace: bool = False) -> Call:
    return input, math.inf, inplace


def _relu_(input: Tensor) -> Call:
    return input, math.inf, True


def _relu6(input: Tensor, inplace: bool = False) -> Call:
    return input, 6, inplace


def _hardtanh(input: Tensor, min_val: float = -1, max_val: float = 1, inplace: bool = False) -> Call:
    return (input, max_val, inplace) if min_val == 0 else None


def _hardtanh_(input: Tensor, min_val: float = -1, max_val: float = 1) -> Call:
    return _hardtanh(input, min_val, max_val, True)


def _clamp(input: Tensor, min: Any = None, max: Any = None, *, out: Any = None, inplace: bool = False) -> Call:
    if isinstance(min, Tensor) or isinstance(max, Tensor) or min != 0 or out is not None:
        return None
    return input, math.inf if max is None else max, inplace


def _clamp_(input: Tensor, min: Any = None, max: Any = None) -> Call:
    return _clamp(input, min, max, inplace=True)


def _swaps(rule: Rule, promise: str) -> dict[Callable[..., Any], Swap]:
    # They do not know the method: a cycle would hold its model until the collector happens to run.
    swaps = {function: _swap(function, read, rule) for function, read in _RECTIFIERS.items()}
    for name, functions in _OTHERS.items():
        swaps |= dict.fromkeys(functions, _refuse(f"{promise}, and the model has {name}; use gradient"))
    return swaps


def _swap(function: Callable[..., Any], read: Callable[..., Call], rule: Rule) -> Swap:
    def swapped(*args: Any, **kwargs: Any) -> Any:
        call = read(*args, **kwargs)
        if call is None:
            return function(*args, **kwargs)
        rule.met = True
        return Rectify.apply(*call, rule)

    return swapped


def _refuse(message: str) -> Swap:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError(message)

    return refuse


_RECTIFIERS: dict[Callable[..., Any], Callable[..., Call]] = {
    F.relu: _relu,
    **dict.fromkeys((torch.relu, torch.Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, torch.Tensor.relu_), _relu_),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,  # nn.ReLU6 ends here
    F.hardtanh_: _hardtanh_,
    **dict.fromkeys((torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.Tensor.clamp_min), _clamp),
    **dict.fromkeys((torch.clamp_, torch.Tensor.clamp_, torch.clamp_min_, torch.Tensor.clamp_min_), _clamp_),
}
_OTHERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "CELU": (F.celu, torch.celu, torch.celu_),
    "ELU": (F.elu, F.elu_),
    "GELU": (F.gelu,),
    "Hardswish": (F.hardswish,),
    "LeakyReLU": (F.leaky_relu, F.leaky_relu_),
    "Mish": (F.mish,),
    "PReLU": (torch.prelu, torch.Tensor.prelu),
    "RReLU": (F.rrelu, torch.rrelu, torch.rrelu_),
    "SELU": (F.selu, torch.selu, torch.selu_),
    "SiLU": (F.silu,),
    "Softplus": (F.softplus,),
}
