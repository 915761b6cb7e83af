"""Delete or insert pixels by their rank in a map, and measure the area under the probability of the target.

Petsiuk 2018 (RISE, 1806.07421), section 4.3 and its published evaluation.

Shape suffixes: B batch, C H W the network's input, N pixels, S points of a curve, R images of one pass.
"""

# ruff: noqa: N815  (fields carry a shape suffix)

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.metrics.faithfulness.passes import BATCH, Logits, probability, shared_passes, target_probability

STEPS = 50
ZERO, BLUR = BASELINES = ("zero", "blur")  # what replaces a pixel: 0 of the normalised input, or the blurred image
_SIDE, _SIGMA = 11, 5  # of RISE's blur, pixels


class Curve(NamedTuple):
    """The probability of the target while pixels change, and the area under it."""

    area_B: Tensor  # float32, in [0, 1]
    probability_BS: Tensor  # float32: point s has s / steps of the pixels changed, so S = steps + 1


def deletion(
    logits: Logits,
    x_BCHW: Tensor,
    map_BHW: Tensor,
    target_B: Tensor,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    baseline: str = ZERO,
    whole_B: Tensor | None = None,
) -> Curve:
    """Remove pixels from the image, those of the highest values first. Less area is better.

    Pixels change in `steps` groups that are equal up to one pixel: point s has floor(s * N / steps) of them changed.
    Pixels of equal value change in the order of their index, row by row, so a constant map wipes from the top.
    Area by the trapezoid: (sum - first / 2 - last / 2) / steps.

    Args:
        logits: of the network, normalised images to logits_BK.
        x_BCHW: normalised images.
        map_BHW: at the images' resolution; only the order of its values counts.
        target_B: int64, the classes.
        steps: groups of pixels.
        batch: images of a pass at most. Samples and steps share passes: 50 steps of 8 samples are 50 passes of 8.
        baseline: `zero` or `blur`, one of BASELINES.
        whole_B: probability of the targets on x_BCHW, if known: saves its pass.
    """
    done_BS = _probabilities(logits, (x_BCHW, _baseline(x_BCHW, baseline)), map_BHW, target_B, (1, steps, steps), batch)
    return _curve(_whole(logits, x_BCHW, target_B, whole_B, batch), done_BS)


def insertion(
    logits: Logits,
    x_BCHW: Tensor,
    map_BHW: Tensor,
    target_B: Tensor,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    baseline: str = BLUR,
    whole_B: Tensor | None = None,
) -> Curve:
    """Insert pixels of the image into its baseline, those of the highest values first. More area is better.

    Arguments, groups, ties and area are those of `deletion`.
    """
    pair = (_baseline(x_BCHW, baseline), x_BCHW)
    done_BS = _probabilities(logits, pair, map_BHW, target_B, (0, steps - 1, steps), batch)
    return _curve(done_BS, _whole(logits, x_BCHW, target_B, whole_B, batch))


def ranks(map_BHW: Tensor) -> Tensor:
    """Return rank_BN, int64: 0 for the pixel of the largest value; equal values rank by index."""
    order_BN = map_BHW.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order_BN.argsort(dim=1)  # the inverse of a permutation


def blurred(x_BCHW: Tensor) -> Tensor:
    """Blur images as RISE does: a Gaussian of 11 pixels, sigma 5, zeros outside of the image.

    Sums of shifted images, since autocast and TF32 would round a convolution.
    """
    for dim, padding in ((2, (0, 0, _SIDE // 2, _SIDE // 2)), (3, (_SIDE // 2, _SIDE // 2))):
        padded_BCHW, length = F.pad(x_BCHW, padding), x_BCHW.shape[dim]
        x_BCHW = torch.zeros_like(x_BCHW)
        for offset, weight in enumerate(_kernel()):
            x_BCHW.add_(padded_BCHW.narrow(dim, offset, length), alpha=weight)
    return x_BCHW


@cache
def _kernel() -> list[float]:
    """Return the weights of one direction.

    RISE filters a point within 11 pixels by a Gaussian of 41 that is reflected at both ends, so the weights are flatter
    than a Gaussian that is cut at 11 pixels.
    """
    reach = 4 * _SIGMA  # scipy cuts a Gaussian at 4 sigma
    gaussian = {shift: math.exp(-((shift / _SIGMA) ** 2) / 2) for shift in range(-reach, reach + 1)}
    total, weights = sum(gaussian.values()), [0.0] * _SIDE
    for shift, value in gaussian.items():
        position = (_SIDE // 2 + shift) % (2 * _SIDE)
        weights[min(position, 2 * _SIDE - 1 - position)] += value / total
    return weights


def _baseline(x_BCHW: Tensor, name: str) -> Tensor:
    if name not in BASELINES:
        raise ValueError(f"the baseline is {name!r}, not one of {', '.join(BASELINES)}")
    return blurred(x_BCHW) if name == BLUR else torch.zeros_like(x_BCHW)


def _whole(logits: Logits, x_BCHW: Tensor, target_B: Tensor, whole_B: Tensor | None, batch: int) -> Tensor:
    whole_B = target_probability(logits, x_BCHW, target_B, batch=batch) if whole_B is None else whole_B
    return whole_B[:, None]


@torch.no_grad()
def _probabilities(
    logits: Logits,
    pair: tuple[Tensor, Tensor],
    map_BHW: Tensor,
    target_B: Tensor,
    span: tuple[int, int, int],
    batch: int,
) -> Tensor:
    """Return the probabilities while pixels change from the first of the pair to the second.

    Args:
        span: first and last point, of how many steps.
    """
    (before_BCHW, after_BCHW), (first, last, steps) = pair, span
    samples, pixels = len(target_B), map_BHW[0].numel()
    rank_BHW = ranks(map_BHW).view(map_BHW.shape)
    parts = []
    for point_R, sample_R in shared_passes(last - first + 1, samples, batch, map_BHW.device):
        changed_R = (first + point_R) * pixels // steps
        changed_R1HW = (rank_BHW[sample_R] < changed_R[:, None, None])[:, None]
        x_RCHW = torch.where(changed_R1HW, after_BCHW[sample_R], before_BCHW[sample_R])
        parts.append(probability(logits(x_RCHW), target_B[sample_R]))
    return torch.cat(parts).view(-1, samples).T


def _curve(*parts: Tensor) -> Curve:
    probability_BS = torch.cat(parts, 1)
    return Curve(torch.trapezoid(probability_BS, dim=1) / (probability_BS.shape[1] - 1), probability_BS)
