"""Describe maps without a network. Noise and blur shift faithfulness, so these figures belong in its tables.

Shape suffixes: B batch, H W the map's grid, N pixels, L levels of a histogram.
"""

# ruff: noqa: N815  (fields carry a shape suffix)

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saltern.pipeline.metrics.faithfulness.passes import unit_maps

LEVELS = 256


class Statistics(NamedTuple):
    """Figures of each map, scaled to [0, 1] by `passes.unit_maps`. All float32."""

    mean_B: Tensor  # of its values
    std_B: Tensor  # of its values, over pixels
    total_variation_B: Tensor  # sum of |difference| of horizontal and of vertical neighbours, over the pixels
    entropy_B: Tensor  # bits, in [0, 8]: of the histogram of its values in 256 equal bins


def map_statistics(map_BHW: Tensor) -> Statistics:
    """Measure maps. The last bin of the histogram includes 1; a constant map has no variation and no entropy."""
    unit_BHW = unit_maps(map_BHW)
    across_B = unit_BHW.diff(dim=2).abs().sum((1, 2))
    down_B = unit_BHW.diff(dim=1).abs().sum((1, 2))
    return Statistics(
        mean_B=unit_BHW.mean((1, 2)),
        std_B=unit_BHW.flatten(1).std(1, correction=0),
        total_variation_B=(across_B + down_B) / unit_BHW[0].numel(),
        entropy_B=_entropy(unit_BHW),
    )


def mask_share(mask_BHW: Tensor) -> Tensor:
    """Return the share of the pixels in each bool mask, float32."""
    return mask_BHW.float().mean((1, 2))


def _entropy(unit_BHW: Tensor) -> Tensor:
    level_BN = (unit_BHW * LEVELS).long().clamp_max(LEVELS - 1).flatten(1)
    count_BL = torch.zeros(len(level_BN), LEVELS, dtype=torch.long, device=level_BN.device)
    count_BL.scatter_add_(1, level_BN, torch.ones_like(level_BN))  # of integers, whose order does not matter
    nats_B: Tensor = torch.special.entr(count_BL / level_BN.shape[1]).sum(1)
    return nats_B / math.log(2)
