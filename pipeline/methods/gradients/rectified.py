"""Gradients with a changed backward pass at each rectifier: deconvnet, guided backpropagation, guided Grad-CAM.

Shape suffixes: B batch, C H W the network's input, K channels of a layer (classes of logits), h w its grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saltern.pipeline.methods.base import Each, weighted_sum
from saltern.pipeline.methods.functions import (
    CLAMPS,
    OTHER_ACTIVATIONS,
    RECTIFIERS,
    activation_name,
    bounds,
    works_in_place,
)
from saltern.pipeline.methods.gradients.gradient import Gradient, pixel_gradients
from saltern.pipeline.models.interception import Interception, Swap, check_visible
from saltern.pipeline.models.passes import Score, full_precision, score_gradients
from saltern.pipeline.models.probe import probe
from saltern.pipeline.models.taps import Taps
from saltern.schemas.errors import UserError

Result = TypeVar("Result")


@dataclass
class Rule:
    """How the backward signal R passes a rectifier with output h; may change between two backward passes."""

    masked: bool  # R * [0 < h < high], as in the true gradient
    clipped: bool  # R * [R > 0]
    met: bool = False  # a rectifier ran


class Rectify(torch.autograd.Function):
    """Clamping of x to 0 <= x <= high, with a rule as its backward pass."""

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
    """Base of the gradients with a rule at every rectifier: ReLU, ReLU6 and clamping at 0."""

    _masked = True
    _clipped = True

    def prepare(self) -> None:
        check_visible(self.model, self.title())
        self._rule = Rule(self._masked, self._clipped)
        self._swaps = _swaps(self._rule, self.title())
        try:
            with torch.no_grad():
                self.forward(probe(self.model, self.input_side))
        except (RuntimeError, ValueError, TypeError, AssertionError):
            pass  # a model for images of another shape is checked on its first batch

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._swapped(lambda: super(Rectified, self).forward(x_BCHW))

    def _swapped(self, run: Callable[[], Result]) -> Result:
        """Run a forward pass under the rule. Raises UserError on another activation, or without any rectifier."""
        self._rule.met = False
        with Interception(self._swaps):
            result = run()
        if not self._rule.met:
            raise UserError(
                f"{self.title()} changes the backward pass of rectifiers, and {type(self.model).__name__} has none; "
                "use gradient"
            )
        return result


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

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        self._rule.clipped = True
        x_BCHW.requires_grad_()
        logits_BK, outputs = self._swapped(lambda: self._taps.forward(x_BCHW, differentiable=True))
        scores = self.scores(logits_BK, target_B, number)
        cams = [self._cam(logits_BK, score, outputs[0], x_BCHW) for score in scores]
        self._rule.clipped = True
        guided = pixel_gradients(logits_BK, scores, x_BCHW)
        maps = [
            self.reduced(gradient.float() * cam_BHW[:, None]) for gradient, cam_BHW in zip(guided, cams, strict=True)
        ]
        return maps, logits_BK, scores

    def _cam(self, logits_BK: Tensor, score: Score, output: Tensor, x_BCHW: Tensor) -> Tensor:
        self._rule.clipped = False  # both backward passes use the same graph
        (gradient,) = self._taps.all_reached(score_gradients(logits_BK, score, [output], keep=True))
        with full_precision(x_BCHW.device):
            size = x_BCHW.shape[2:]
            A_BKhw, G_BKhw = self._taps.grid(0, output, size), self._taps.grid(0, gradient, size)
            cam_Bhw = weighted_sum(G_BKhw.mean((2, 3)), A_BKhw).relu()
            return F.interpolate(cam_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _swaps(rule: Rule, method: str) -> dict[Any, Swap]:
    # The swaps do not refer to the method: such a cycle would hold its model until the garbage collector runs.
    changes = f"{method} changes the backward pass of rectifiers (ReLU, ReLU6), and the model has"
    refusals = {each: _refuse(f"{changes} {activation_name(each)}; use gradient") for each in OTHER_ACTIVATIONS}
    return refusals | {each: _swap(each, rule) for each in RECTIFIERS | CLAMPS}


def _swap(function: Any, rule: Rule) -> Swap:
    def swapped(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        low, high = bounds(function, args, kwargs)
        if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0 or kwargs.get("out") is not None:
            return function(input, *args, **kwargs)
        rule.met = True
        return Rectify.apply(input, math.inf if high is None else high, works_in_place(function, args, kwargs), rule)

    return swapped


def _refuse(message: str) -> Swap:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError(message)

    return refuse
