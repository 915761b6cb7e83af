"""Coherency and complexity of maps, and the composite scores ADCC and ARCC.

Poppi 2021 (2104.10252), section 3, and its published code; Domeniconi 2026 (2605.14641).

Shape suffixes: B batch, C H W the network's input, N pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saltern.pipeline.metrics.faithfulness.passes import masked, unit_maps

Explain = Callable[[Tensor, Tensor], Tensor]  # x_BCHW, target_B -> map_BHW at the images' resolution


def coherency(explain: Explain, x_BCHW: Tensor, map_BHW: Tensor, target_B: Tensor, black_C11: Tensor) -> Tensor:
    """Return coherency_B in [0, 1], float32: (1 + correlation) / 2 of the map and the map of the image that it masks.

    Pearson's correlation over pixels; more is better. Where one of the two maps is constant it is not defined, and the
    result is 0 (the published code does so for maps with NaN).

    Args:
        explain: the method. It must not depend on the batch.
        x_BCHW: normalised images.
        map_BHW: their maps by `explain`, scaled here by `passes.unit_maps`.
        target_B: int64, the classes.
        black_C11: of `passes.black_level`; the published code multiplies the normalised image.
    """
    unit_BHW = unit_maps(map_BHW)
    again_BHW = explain(masked(x_BCHW, unit_BHW, black_C11), target_B)
    return coherency_of(unit_BHW, unit_maps(again_BHW))


def coherency_of(one_BHW: Tensor, other_BHW: Tensor) -> Tensor:
    """Return coherency_B of two maps, as `coherency`."""
    one_BN, other_BN = (
        (map_BHW - map_BHW.mean((1, 2), keepdim=True)).flatten(1).double() for map_BHW in (one_BHW, other_BHW)
    )
    size_B = one_BN.norm(dim=1) * other_BN.norm(dim=1)
    correlation_B = ((one_BN * other_BN).sum(1) / size_B).clamp(-1, 1)
    return torch.where(size_B > 0, (1 + correlation_B) / 2, 0).float()


def complexity(map_BHW: Tensor) -> Tensor:
    """Return complexity_B in [0, 1], float32: the L1 norm of the scaled map over its pixels; less is better."""
    return unit_maps(map_BHW).mean((1, 2))


def adcc(coherency_B: Tensor, complexity_B: Tensor, drop_B: Tensor) -> Tensor:
    """Return the harmonic mean of coherency, 1 - complexity and 1 - average drop (Poppi 2021, equation 5)."""
    return _harmonic_mean(coherency_B, 1 - complexity_B, 1 - drop_B)


def arcc(coherency_B: Tensor, complexity_B: Tensor, road_B: Tensor) -> Tensor:
    """Return the harmonic mean of coherency, 1 - complexity and ROAD's combination (Domeniconi 2026)."""
    return _harmonic_mean(coherency_B, 1 - complexity_B, road_B)


def _harmonic_mean(*parts: Tensor) -> Tensor:
    """Return the harmonic mean of each sample, 0 if one of its parts is not positive."""
    parts_B3 = torch.stack(parts, 1)
    mean_B = parts_B3.shape[1] / (1 / parts_B3.where(parts_B3 > 0, torch.ones_like(parts_B3))).sum(1)
    return torch.where((parts_B3 > 0).all(1), mean_B, 0)
