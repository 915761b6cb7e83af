"""Find the connected parts, and the holes, of maps' level sets at all levels together.

Shape suffixes: B maps, H W pixels, h w a region of a map, P pixels of all maps with their margins, N nodes, K basins,
L levels, V values, R parts at one level.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization.basins import Basins, Bytes, Ints, Labels, bright_and_dark

LEVELS = 255  # level t is the pixels above t: 0 to 254
_FEW = 40  # basins of a map that are measured one by one; more are measured together
_MANY = 4096  # basins; the tables of more are not made for several maps together
_Alive = tuple[int, int, NDArray[np.int32]]


class Parts(NamedTuple):
    """Connected parts, one row for each level that they are at."""

    map: Ints  # (R)
    level: Ints  # (R)
    box: NDArray[np.int32]  # (R, 4) x0, y0, x1, y1, tight, half-open, pixels of the map
    area: NDArray[np.float64]  # (R) of the polygon through the pixel centres, without its holes; 0 for holes


def parts_and_holes(map_BHW: Bytes) -> tuple[Parts, Parts]:
    """Return the 8-connected parts of {map > t}, and the 4-connected parts of {map <= t} that touch no edge.

    Args:
        map_BHW: 8-bit maps.
    """
    bright, dark = bright_and_dark(map_BHW)
    if len(map_BHW) > 1 and len(bright.top) + len(dark.top) > _MANY:
        each = zip(*(parts_and_holes(map_BHW[number : number + 1]) for number in range(len(map_BHW))), strict=True)
        parts, holes = (_joined(one_by_one) for one_by_one in each)
        return parts, holes
    holes = _parts(dark, areas=False)
    return _parts(bright, areas=True), holes._replace(level=LEVELS - 1 - holes.level)


def _joined(one_by_one: Sequence[Parts]) -> Parts:
    """Return the parts of maps in one table."""
    numbered = [each._replace(map=each.map + number) for number, each in enumerate(one_by_one)]
    return Parts(*(np.concatenate(columns) for columns in zip(*numbered, strict=True)))


def _parts(basins: Basins, *, areas: bool) -> Parts:
    """Return the parts above each level, except those that are connected to the margin."""
    alive = list(_alive(basins, _tables(basins, areas)))
    basin = np.array([each[0] for each in alive], np.int64)
    low = np.array([each[1] for each in alive], np.int64)
    table_5R = np.concatenate([np.zeros((5, 0), np.int32), *(each[2] for each in alive)], 1)
    long = np.array([each[2].shape[1] for each in alive], np.int64)
    level_R = np.arange(table_5R.shape[1]) - np.repeat(np.cumsum(long) - long - low, long)
    table_5R[2:4] *= -1
    return Parts(np.repeat(basins.map[basin], long), level_R, table_5R[:4].T, table_5R[4] / 2)


def _alive(basins: Basins, table_K5L: NDArray[np.int32]) -> Iterator[_Alive]:
    """Yield each part while no other joins it: one of its basins, its lowest level, its table from there up.

    Joins the basins by falling height (Kruskal). Overwrites the tables: a basin's holds its part at lower levels.
    """
    margin = len(basins.top)
    parent, top = list(range(margin + 1)), [*basins.top.tolist(), 256]  # the margin is the last, so -1 too

    for (one, other), height in zip(basins.passes.tolist(), basins.height.tolist(), strict=True):
        first, second = _root(parent, one), _root(parent, other)
        if first == second:
            continue
        if first == margin:
            first, second = second, first
        for each in (first, second):
            if each != margin and height < top[each]:
                yield each, height, table_K5L[each, :, height : top[each]].copy()
        parent[first] = second
        if second != margin:
            top[second] = height
            lower, upper = table_K5L[second, :, :height], table_K5L[first, :, :height]
            np.minimum(lower[:4], upper[:4], out=lower[:4])
            lower[4] += upper[4]
    for basin in range(margin):
        if parent[basin] == basin:
            yield basin, 0, table_K5L[basin, :, : top[basin]]


def _root(parent: list[int], basin: int) -> int:
    while parent[basin] != basin:
        parent[basin] = basin = parent[parent[basin]]
    return basin


def _tables(basins: Basins, areas: bool) -> NDArray[np.int32]:
    """Return each basin's box above each level, as x0, y0, -x1, -y1, and twice its area (K, 5, L).

    The box of no pixel is W, H, 0, 0, so that the smaller of two boxes' numbers give the box round both.
    """
    batch, height, width = basins.shape
    table_K5L = np.zeros((len(basins.top), 5, LEVELS), np.int32)
    basin_P = basins.of_pixel
    row_KH, region_K4 = _rows(basins)
    column_KW = np.zeros((len(basins.top), width), np.uint8)
    pixels = basins.value, basin_P, *(_squares(basins.value, basin_P, width + 1) if areas else ())
    maps = zip(*(each_P[width + 1 :].reshape(batch, height + 1, width + 1) for each_P in pixels), strict=True)
    first_B = np.searchsorted(basins.map, np.arange(batch + 1)).tolist()
    for (first, end), (value_HW, basin_HW, *squares_HW) in zip(itertools.pairwise(first_B), maps, strict=True):
        if end - first > _FEW:
            y, x = np.nonzero(basin_HW[:height, :width] >= 0)
            np.maximum.at(column_KW, (basin_HW[y, x], x), value_HW[y, x])
            if areas:
                table_K5L[first:end, 4] = _areas(squares_HW, first, end)
            continue
        for basin in range(first, end):
            x0, y0, x1, y1 = region_K4[basin]
            mask_hw = (basin_HW[y0:y1, x0:x1] == basin).view(np.uint8)
            column_KW[basin, x0:x1] = (value_HW[y0:y1, x0:x1] * mask_hw).max(0)
        if areas and first < end:
            table_K5L[first:end, 4] = _areas_by_region(squares_HW, region_K4[first:end], first)
    _span(column_KW, table_K5L[:, 0], table_K5L[:, 2])
    _span(row_KH, table_K5L[:, 1], table_K5L[:, 3])
    return table_K5L


def _rows(basins: Basins) -> tuple[Bytes, list[list[int]]]:
    """Return each basin's largest value in each row, and a box round its pixels."""
    _, height, width = basins.shape
    some_N = np.flatnonzero(basins.basin >= 0)
    basin_N = basins.basin[some_N]
    # A node starts where its values begin to rise, in the row of all its pixels but zeros.
    line_N, x0_N = np.divmod(basins.start[some_N] - width - 1, width + 1)
    y_N, x1_N = line_N % (height + 1), np.minimum(x0_N + basins.length[some_N], width)
    row_KH = np.zeros((len(basins.top), height), np.uint8)
    np.maximum.at(row_KH, (basin_N, y_N), basins.peak[some_N])
    region_4K = np.repeat([[width], [height], [0], [0]], len(basins.top), 1)
    for edge_K, edge_N in zip(region_4K[:2], (x0_N, y_N), strict=True):
        np.minimum.at(edge_K, basin_N, edge_N)
    for edge_K, edge_N in zip(region_4K[2:], (x1_N, y_N + 1), strict=True):
        np.maximum.at(edge_K, basin_N, edge_N)
    return row_KH, region_4K.T.tolist()


def _span(most_KX: Bytes, start_KL: NDArray[np.int32], end_KL: NDArray[np.int32]) -> None:
    """Set the first of the X lines that has a pixel above each level, and minus the one after the last."""
    basins, lines = most_KX.shape
    offset_K1 = 256 * np.arange(basins)[:, None]
    for lines_KX, span_KL, shift in ((most_KX, start_KL, 0), (most_KX[:, ::-1], end_KL, lines)):
        climbed_KX = np.maximum.accumulate(lines_KX, 1) + offset_K1
        below_KV = np.bincount(climbed_KX.reshape(-1), minlength=256 * basins).reshape(basins, 256).cumsum(1)
        span_KL[:] = below_KV[:, :LEVELS] - shift


def _squares(value_P: Bytes, basin_P: Labels, stride: int) -> tuple[Bytes, Bytes, Labels]:
    """Return the lowest and the second lowest value, and the basin, of each square of four pixels, by its first.

    A part's polygon through its pixel centres covers a square between four centres wholly if all four are above the
    level, and half of it if three are. So the part's area is half of the numbers of both values above the level.
    """
    p, q, r, s = value_P[: -stride - 1], value_P[1:-stride], value_P[stride:-1], value_P[stride + 1 :]
    low, other_low, high, other_high = np.minimum(p, q), np.minimum(r, s), np.maximum(p, q), np.maximum(r, s)
    lowest_P, second_P, of_P = np.zeros_like(value_P), np.zeros_like(value_P), basin_P.copy()
    np.minimum(low, other_low, out=lowest_P[: -stride - 1])
    second = np.minimum(np.maximum(low, other_low), np.minimum(high, other_high), out=second_P[: -stride - 1])
    # If three pixels are above the level, then one of the upper two is, and they are of one part.
    np.copyto(of_P[: -stride - 1], basin_P[1:-stride], where=p < second)
    return lowest_P, second_P, of_P


def _areas_by_region(squares_HW: Sequence[NDArray[Any]], region_K4: Sequence[Sequence[int]], first: int) -> Ints:
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


def _areas(squares_HW: Sequence[NDArray[Any]], first: int, end: int) -> Ints:
    """Return twice the area of each basin of one map above each level (K, L)."""
    lowest_HW, second_HW, basin_HW = squares_HW
    y, x = np.nonzero(second_HW)
    basin = 256 * (basin_HW[y, x].astype(np.int64) - first)
    keys = np.concatenate([basin + lowest_HW[y, x], basin + second_HW[y, x]])
    count_KV = np.bincount(keys, minlength=256 * (end - first)).reshape(end - first, 256)
    return count_KV[:, :0:-1].cumsum(1)[:, ::-1]
