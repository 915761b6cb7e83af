"""Measure the areas of maps' connected parts at all levels together.

Shape suffixes: B maps, H W pixels, h w a region of a map, P pixels of a map with its margins, K basins, L levels,
V values, R parts at one level.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization.basins import Basins, Bytes, Ints
from saltern.pipeline.metrics.localization.levels import FEW, LEVELS, each_level

_Squares = tuple[Bytes, Bytes, NDArray[np.signedinteger[Any]]]


def areas_of(bright: Basins, some_B: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the area of the polygon through the pixel centres, without its holes, of each part of some maps.

    Args:
        bright: the first basins of `bright_and_dark`.
        some_B: the maps.

    Returns:
        (R), in the order in which `parts_of` returns the parts of these maps.
    """
    twice_K1L = np.zeros((len(bright.top), 1, LEVELS), np.int32)
    for number in np.flatnonzero(some_B).tolist():
        first, end = bright.of_maps[number]
        squares_HW = _squares(*bright.pixels_of(number))
        if end - first > FEW:
            twice_K1L[first:end, 0] = _together(squares_HW, first, end)
        elif end > first:
            twice_K1L[first:end, 0] = _by_region(squares_HW, bright.regions[first:end], first)
    twice_R: NDArray[np.int32] = each_level(bright, twice_K1L, np.add, some_B)[2][0]
    return twice_R / 2


def _squares(value_HW: Bytes, basin_HW: NDArray[np.signedinteger[Any]]) -> _Squares:
    """Return the lowest and the second lowest value, and the basin, of each square of four pixels, by its first.

    A part's polygon through its pixel centres covers a square between four centres wholly if all four are above the
    level, and half of it if three are. So the part's area is half of the numbers of both values above the level.
    """
    value_P, basin_P, stride = value_HW.reshape(-1), basin_HW.reshape(-1), value_HW.shape[1]
    p, q, r, s = value_P[: -stride - 1], value_P[1:-stride], value_P[stride:-1], value_P[stride + 1 :]
    low, other_low, high, other_high = np.minimum(p, q), np.minimum(r, s), np.maximum(p, q), np.maximum(r, s)
    lowest_P, second_P, of_P = np.zeros_like(value_P), np.zeros_like(value_P), basin_P.copy()
    np.minimum(low, other_low, out=lowest_P[: -stride - 1])
    second = np.minimum(np.maximum(low, other_low), np.minimum(high, other_high), out=second_P[: -stride - 1])
    # If three pixels are above the level, then one of the upper two is, and they are of one part.
    np.copyto(of_P[: -stride - 1], basin_P[1:-stride], where=p < second)
    shape = value_HW.shape
    return lowest_P.reshape(shape), second_P.reshape(shape), of_P.reshape(shape)


def _by_region(squares_HW: _Squares, region_K4: Sequence[Sequence[int]], first: int) -> Ints:
    """Return twice the area of each basin of one map above each level (K, L); `first` is the number of the first."""
    lowest_HW, second_HW, basin_HW = squares_HW
    widest = max(range(len(region_K4)), key=lambda basin: _extent(region_K4[basin]))
    above_KL = np.zeros((len(region_K4), LEVELS), np.int64)
    above_KL[widest] = _counts_above(lowest_HW, second_HW, None)
    for basin, (x0, y0, x1, y1) in enumerate(region_K4):
        if basin != widest:
            region = slice(y0, y1), slice(max(x0 - 1, 0), x1)
            mask_hw = (basin_HW[region] == first + basin).view(np.uint8)
            above_KL[basin] = _counts_above(lowest_HW[region], second_HW[region], mask_hw)
            above_KL[widest] -= above_KL[basin]
    return above_KL


def _extent(region: Sequence[int]) -> int:
    return (region[2] - region[0]) * (region[3] - region[1])


def _counts_above(lowest_hw: Bytes, second_hw: Bytes, mask_hw: Bytes | None) -> Ints:
    """Return how many of both values are above each level (L)."""
    lowest_V, second_V = (cv2.calcHist([each_hw], [0], mask_hw, [256], [0, 256]) for each_hw in (lowest_hw, second_hw))
    above_L: Ints = (lowest_V + second_V).reshape(-1)[:0:-1].astype(np.int64).cumsum()[::-1]
    return above_L


def _together(squares_HW: _Squares, first: int, end: int) -> Ints:
    """Return twice the area of each basin of one map above each level (K, L)."""
    lowest_HW, second_HW, basin_HW = squares_HW
    y, x = np.nonzero(second_HW)
    basin = 256 * (basin_HW[y, x].astype(np.int64) - first)
    keys = np.concatenate([basin + lowest_HW[y, x], basin + second_HW[y, x]])
    count_KV = np.bincount(keys, minlength=256 * (end - first)).reshape(end - first, 256)
    return count_KV[:, :0:-1].cumsum(1)[:, ::-1]
