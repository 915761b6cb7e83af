"""Turn real-valued maps into masks and boxes.

Shape suffixes: B batch, H W the network's input, h w a map's grid, N pixels, L levels of a histogram.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.maps.boxes import largest_boxes
from saltern.schemas.rules import Rule


def discretize(map_BHW: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Discretize maps at input resolution.

    The rule gets each map scaled to [0, 1] by its minimum and maximum. Its threshold is converted back to the map's
    unit, so that `mask = map >= threshold` holds exactly.

    Returns:
        mask_BHW bool, threshold_B float32.
    """
    lo_B, hi_B = map_BHW.amin((1, 2)), map_BHW.amax((1, 2))
    span_B = hi_B - lo_B
    unit_BHW = (map_BHW - lo_B[:, None, None]) / span_B.where(span_B > 0, torch.ones_like(span_B))[:, None, None]
    unit_B = _RULES[rule.name](unit_BHW, rule.number)
    chosen_BHW = torch.where(unit_BHW >= unit_B[:, None, None], map_BHW, torch.inf)
    # The conversion rounds. The threshold must not exceed the value that the rule chose, or the mask would lose it.
    threshold_B = (lo_B + unit_B * span_B).minimum(chosen_BHW.amin((1, 2)))
    return map_BHW >= threshold_B[:, None, None], threshold_B


def upsample(map_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample maps to `size` = (height, width) pixels: bilinear, align_corners False, float32."""
    if map_Bhw.shape[-2:] == size:
        return map_Bhw
    return F.interpolate(map_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def largest_box(mask_HW: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Return the tight box of the largest 4-connected component of a mask, as `largest_boxes`; None if it is empty."""
    x0, y0, x1, y1 = largest_boxes(np.packbits(mask_HW[None], axis=2))[0].tolist()
    return (x0, y0, x1, y1) if x1 else None


def _mean(unit_BHW: Tensor, alpha: float) -> Tensor:
    return alpha * unit_BHW.mean((1, 2))


def _mean_std(unit_BHW: Tensor, k: float) -> Tensor:
    return unit_BHW.mean((1, 2)) + k * unit_BHW.flatten(1).std(1, correction=0)


def _quantile(unit_BHW: Tensor, q: float) -> Tensor:
    kept = max(1, round((1 - q) * unit_BHW[0].numel()))
    return _kth_largest(unit_BHW, torch.full((len(unit_BHW),), kept, device=unit_BHW.device))


def _fraction(unit_BHW: Tensor, _: float) -> Tensor:
    return _kth_largest(unit_BHW, (unit_BHW.mean((1, 2)) * unit_BHW[0].numel()).round().long())


def _kth_largest(unit_BHW: Tensor, count_B: Tensor) -> Tensor:
    ordered_BN = unit_BHW.flatten(1).sort(1, descending=True).values
    return ordered_BN.gather(1, (count_B.clamp(1, ordered_BN.shape[1]) - 1)[:, None])[:, 0]


def _fixed(unit_BHW: Tensor, t: float) -> Tensor:
    return unit_BHW.new_full((len(unit_BHW),), t)


def _max(unit_BHW: Tensor, alpha: float) -> Tensor:
    return alpha * unit_BHW.amax((1, 2))


def _otsu(unit_BHW: Tensor, _: float) -> Tensor:
    """Return the threshold that maximises the variance between the two classes (Otsu 1979), on 256 levels."""
    level_BN = (unit_BHW * 255).round().long().flatten(1)
    # Counts are whole numbers, whose sums repeat on a GPU: torch 2.11 has no deterministic cumsum of floats there.
    count_BL = level_BN.new_zeros(len(unit_BHW), 256).scatter_add_(1, level_BN, torch.ones_like(level_BN))
    moment_BL = (count_BL * torch.arange(256, device=unit_BHW.device)).cumsum(1).double() / level_BN.shape[1]
    below_BL = count_BL.cumsum(1).double() / level_BN.shape[1]
    between_BL = (moment_BL[:, -1:] * below_BL - moment_BL) ** 2 / (below_BL * (1 - below_BL)).clamp_min(1e-12)
    return (between_BL.argmax(1) + 0.5) / 255


# By name: unit_BHW in [0, 1] and the rule's number -> threshold_B in [0, 1].
_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": _mean,
    "mean-std": _mean_std,
    "quantile": _quantile,
    "fraction": _fraction,
    "fixed": _fixed,
    "max": _max,
    "otsu": _otsu,
}
