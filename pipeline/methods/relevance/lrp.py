"""Layer-wise relevance propagation to the pixels (LRP, CLRP, SGLRP), and Relevance-CAM.

Shape suffixes: B batch, C H W the network's input, K channels of a layer (classes of logits), h w its grid.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from saltern.pipeline.methods.base import Each, Maps, Method, weighted_sum
from saltern.pipeline.methods.relevance.propagation import Propagation
from saltern.pipeline.methods.relevance.rules import RELEVANCE_CAM, composite
from saltern.pipeline.models.passes import Score, full_precision, logits_of
from saltern.pipeline.models.probe import probe
from saltern.pipeline.models.taps import Taps
from saltern.schemas.errors import UserError

_FLOOR = 1e-8
_BN_HELP = "BatchNorm: merge = folded into the layer before it; identity = passes relevance unchanged."
_SOFTMAX_HELP = "Softmax of attention: constant = CP-LRP, values take all relevance; attnlrp = the rule of AttnLRP."
_INIT_HELP = (
    "Relevance of the logits: unit = +1 for the class, -1/N for each other of N; paper = z_c and -z_c / (N - 1)"
)


def target_logit(logits_BK: Tensor, score: Score) -> Tensor:
    """Return z_c at the explained class, -alpha/N z_n at each of the N that it is compared with, 0 elsewhere."""
    return score.weights(logits_BK) * logits_BK


def contrast_unit(logits_BK: Tensor, score: Score) -> Tensor:
    """Return +1 at the explained class, -1/N at each other of N classes; the sum is 1/N whatever the logit's sign.

    A finer target has only the classes that it is compared with, each with -alpha/N.
    """
    if score.others_BN is not None:
        return score.weights(logits_BK)
    others_BK = torch.full_like(logits_BK, -1 / logits_BK.shape[1])
    return _spread(torch.ones_like(logits_BK[:, :1]), others_BK, score.class_B)


def contrast_paper(logits_BK: Tensor, score: Score) -> Tensor:
    """Return z_c at the explained class, -z_c / (N - 1) at each other of N classes (Gu 2018, section 3.2).

    A finer target has only the classes that it is compared with, each with -alpha/N z_c.
    """
    z_B1 = logits_BK.gather(1, score.class_B[:, None])
    if score.others_BN is not None:
        return score.weights(logits_BK) * z_B1
    return _spread(z_B1, (-z_B1 / max(1, logits_BK.shape[1] - 1)).expand_as(logits_BK), score.class_B)


def softmax_gradient(logits_BK: Tensor, score: Score) -> Tensor:
    """Return y_c (1 - y_c) at the explained class, -y_c y_n elsewhere, magnitudes >= 1e-8 (Iwana 2019, eq. 8)."""
    target_B = score.class_B
    y_BK = logits_BK.softmax(1)
    y_B1 = y_BK.gather(1, target_B[:, None])
    rest_BK = y_BK.scatter(1, target_B[:, None], 0)  # sums to 1 - y_c without cancellation near y_c = 1
    return _spread(
        (y_B1 * rest_BK.sum(1, keepdim=True)).clamp(min=_FLOOR), -(y_B1 * rest_BK).clamp(min=_FLOOR), target_B
    )


def _spread(own_B1: Tensor, others_BK: Tensor, target_B: Tensor) -> Tensor:
    return others_BK.scatter(1, target_B[:, None], own_B1)


Initial = Callable[[Tensor, Score], Tensor]
_INITIAL: dict[str, Initial] = {"unit": contrast_unit, "paper": contrast_paper, "sglrp": softmax_gradient}


def _start(initial: Initial, logits_BK: Tensor, score: Score) -> Tensor:
    """Return the relevance of the logits, in their dtype (float32 at least)."""
    with torch.no_grad(), full_precision(logits_BK.device):
        return initial(logits_BK.detach(), score)


def _as_ran(logits_BK: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return logits in the dtype of a plain forward pass; relevance widened them."""
    kind = x_BCHW.device.type
    return logits_BK.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BCHW.dtype)


class PixelRelevance(Method):
    """Base of the methods that propagate relevance to the pixels. A subclass returns its `_initial` relevance.

    Composites are those of zennit, by layer (convolution, linear, convolution on the image): alpha1beta0 (alpha1beta0,
    alpha1beta0, z^B), epsilon (1e-6 everywhere), gamma (0.25 everywhere), epsilon-plus (alpha1beta0, epsilon,
    alpha1beta0) and epsilon-gamma-box (gamma, epsilon, z^B). The smallest and largest value of each image bound z^B.
    """

    cost = "1 forward, 1 backward by rules"
    comparable = True
    heavy_tailed = True

    composite: Annotated[
        Literal["alpha1beta0", "epsilon", "gamma", "epsilon-plus", "epsilon-gamma-box"], "Rules by kind of layer."
    ] = "alpha1beta0"
    bn: Annotated[Literal["merge", "identity"], _BN_HELP] = "merge"
    softmax: Annotated[Literal["constant", "attnlrp"], _SOFTMAX_HELP] = "constant"

    def _initial(self) -> Initial:
        raise NotImplementedError

    def prepare(self) -> None:
        rules = replace(composite(self.composite), merge=self.bn == "merge", softmax=self.softmax)
        advice = "use gradient, or relevance-cam at a layer after it"
        self._propagation = Propagation(self.model, rules, self.title(), advice)
        _try_out(self.model, lambda x_BCHW: self._propagation.check(self._forward(x_BCHW)[0]))

    def _forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        wide_BCHW = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32)).detach().requires_grad_()
        # The model gets a copy, because it may change its input in place.
        copy_BCHW = wide_BCHW.clone()
        with self._propagation.interception(copy_BCHW):
            return logits_of(self.model(copy_BCHW)), wide_BCHW

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        logits_BK, wide_BCHW = self._forward(x_BCHW)
        self._propagation.check(logits_BK)
        scores = self.scores(logits_BK, target_B, number)
        if not logits_BK.requires_grad:
            raise UserError(f"{self.title()}: the logits of {type(self.model).__name__} do not depend on the image")
        starts = [_start(self._initial(), logits_BK, score) for score in scores]
        each = self._propagation.relevance(logits_BK, [wide_BCHW], starts)
        maps = [R_BCHW.sum(1) for (R_BCHW,) in each if R_BCHW is not None]
        return maps, _as_ran(logits_BK, x_BCHW), scores


class LRP(PixelRelevance):
    """Layer-wise relevance propagation of the logit to the pixels; summed over channels, signed (Bach 2015)."""

    name = "lrp"

    def _initial(self) -> Initial:
        return target_logit


class CLRP(PixelRelevance):
    """Contrastive LRP: relevance for the class minus that of the others; summed over channels, signed (Gu 2018)."""

    name = "clrp"

    init: Annotated[Literal["unit", "paper"], f"{_INIT_HELP}."] = "unit"

    def _initial(self) -> Initial:
        return _INITIAL[self.init]


class SGLRP(PixelRelevance):
    """Softmax-gradient LRP: starts from the derivative of the class's softmax; summed over channels (Iwana 2019)."""

    name = "sglrp"
    comparable = False  # compares the class with all others, by their probabilities

    def _initial(self) -> Initial:
        return softmax_gradient


class RelevanceCAM(Method):
    """Activations weighted by the mean relevance of each channel; signed, for shallow layers too (Lee 2021, eq. 8).

    Relevance follows alpha = 1, beta = 0 as in the published code: the bias of a convolution counts twice, that of a
    linear layer not at all. The relevance of a stage sums to that of the logits, except for what the biases of
    convolutions absorb.
    """

    name = "relevance-cam"
    cost = "1 forward, and the backward by rules down to the layer"
    layered = True
    comparable = True
    many_layers = True

    init: Annotated[
        Literal["unit", "paper", "sglrp"], f"{_INIT_HELP}; sglrp = y_c (1 - y_c) and -y_c y_n of the softmax y."
    ] = "unit"
    bn: Annotated[Literal["identity", "merge"], _BN_HELP] = "identity"
    softmax: Annotated[Literal["constant", "attnlrp"], _SOFTMAX_HELP] = "constant"

    def prepare(self) -> None:
        if self._contrast is not None and self.init == "sglrp":
            raise UserError(f"{self.title()} with init=sglrp compares the class with all others; give unit or paper")
        self._taps = Taps(self.model, self.layer)
        rules = replace(RELEVANCE_CAM, merge=self.bn == "merge", softmax=self.softmax)
        advice = "choose a layer after it, or use grad-cam"
        self._propagation = Propagation(self.model, rules, self.title(), advice)
        _try_out(self.model, lambda x_BCHW: self._propagation.check(self._forward(x_BCHW)[0]))

    def _forward(self, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        with self._propagation.interception(x_BCHW):
            return self._taps.forward(x_BCHW, differentiable=True)

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        logits_BK, outputs = self._forward(x_BCHW)
        self._propagation.check(logits_BK)
        scores = self.scores(logits_BK, target_B, number)
        starts = [_start(_INITIAL[self.init], logits_BK, score) for score in scores]
        each = self._propagation.relevance(logits_BK, outputs, starts)
        maps = [self._combined(outputs, self._taps.all_reached(relevance), x_BCHW) for relevance in each]
        return maps, _as_ran(logits_BK, x_BCHW), scores

    def _combined(self, outputs: list[Tensor], relevance: list[Tensor], x_BCHW: Tensor) -> Maps:
        image = x_BCHW.shape[2:]
        with full_precision(x_BCHW.device), torch.no_grad():
            return tuple(
                weighted_sum(self._taps.grid(index, R, image).mean((2, 3)), self._taps.grid(index, A, image))
                for index, (A, R) in enumerate(zip(outputs, relevance, strict=True))
            )


def _try_out(model: torch.nn.Module, forward: Callable[[Tensor], None]) -> None:
    """Refuse operations without a rule now; for a model that fails on the probe, the first batch does it."""
    try:
        forward(probe(model)[:1])
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return
