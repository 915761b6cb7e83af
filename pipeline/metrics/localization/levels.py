"""Find the connected parts, and the holes, of maps' level sets at all levels together.

Shape suffixes: B maps, H W pixels, h w a region of a map, K basins, C numbers of a table, L levels, V values, R parts
at one level.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization.basins import Basins, Bytes, Ints

LEVELS = 255  # level t is the pixels above t: 0 to 254
FEW = 40  # basins of a map that are measured one by one; more are measured together
_Tables = NDArray[np.int32]
_Alive = tuple[int, int, _Tables]


class Parts(NamedTuple):
    """Connected parts, one row for each level that they are at."""

    map: Ints  # (R)
    level: Ints  # (R)
    box: _Tables  # (R, 4) x0, y0, x1, y1, tight, half-open, pixels of the map


def parts_of(bright: Basins) -> Parts:
    """Return the 8-connected parts of {map > t}, from the first basins of `bright_and_dark`."""
    basin_R, level_R, table_4R = each_level(bright, _boxes(bright), np.minimum)
    table_4R[2:] *= -1
    return Parts(bright.map[basin_R], level_R, table_4R.T)


def holes_of(dark: Basins) -> Parts:
    """Return the 4-connected parts of {map <= t} that touch no edge, from the second basins of `bright_and_dark`."""
    holes = parts_of(dark)
    return holes._replace(level=LEVELS - 1 - holes.level)


def each_level(
    basins: Basins, table_KCL: _Tables, join: Callable[..., Any], some_B: NDArray[np.bool_] | None = None
) -> tuple[Ints, Ints, _Tables]:
    """Return the parts above each level, except those that are connected to the margin, in an order of their own.

    Args:
        basins: of a batch of maps.
        table_KCL: the numbers of each basin above each level; overwritten.
        join: makes the numbers of two basins together from those of each, as a ufunc does.
        some_B: the maps whose parts are returned; None: all.

    Returns:
        A basin of each part (R), its level (R), its numbers (C, R).
    """
    alive = list(_alive(basins, table_KCL, join, some_B))
    basin, low = np.array([each[:2] for each in alive], np.int64).reshape(-1, 2).T
    table_CR = np.concatenate([table_KCL[:0].reshape(table_KCL.shape[1], 0), *(each[2] for each in alive)], 1)
    long = np.array([each[2].shape[1] for each in alive], np.int64)
    level_R = np.arange(table_CR.shape[1]) - np.repeat(np.cumsum(long) - long - low, long)
    return np.repeat(basin, long), level_R, table_CR


def _alive(
    basins: Basins, table_KCL: _Tables, join: Callable[..., Any], some_B: NDArray[np.bool_] | None
) -> Iterator[_Alive]:
    """Yield each part while no other joins it: one of its basins, its lowest level, its table from there up.

    Joins the basins by falling height (Kruskal). Overwrites the tables: a basin's holds its part at lower levels.
    """
    margin = len(basins.top)
    parent, top = list(range(margin + 1)), [*basins.top.tolist(), 256]  # the margin is the last, so -1 too
    some_K = np.ones(margin, np.bool_) if some_B is None else some_B[basins.map]
    kept = some_K[basins.passes.max(1)]  # both of a pass are of one map, or one is the margin
    passes, height_E, shown = basins.passes[kept], basins.height[kept], np.flatnonzero(some_K).tolist()
    for (one, other), height in zip(passes.tolist(), height_E.tolist(), strict=True):
        first, second = _root(parent, one), _root(parent, other)
        if first == second:
            continue
        if first == margin:
            first, second = second, first
        for each in (first, second):
            if each != margin and height < top[each]:
                yield each, height, table_KCL[each, :, height : top[each]].copy()
        parent[first] = second
        if second != margin:
            top[second] = height
            lower = table_KCL[second, :, :height]
            join(lower, table_KCL[first, :, :height], out=lower)
    for basin in shown:
        if parent[basin] == basin:
            yield basin, 0, table_KCL[basin, :, : top[basin]]


def _root(parent: list[int], basin: int) -> int:
    while parent[basin] != basin:
        parent[basin] = basin = parent[parent[basin]]
    return basin


def _boxes(basins: Basins) -> _Tables:
    """Return each basin's box above each level, as x0, y0, -x1, -y1 (K, 4, L).

    The box of no pixel is W, H, 0, 0, so that the smaller of two boxes' numbers give the box round both.
    """
    _, height, width = basins.shape
    table_K4L = np.empty((len(basins.top), 4, LEVELS), np.int32)
    column_KW, row_KH = np.zeros((len(basins.top), width), np.uint8), np.zeros((len(basins.top), height), np.uint8)
    some_N = np.flatnonzero(basins.basin >= 0)
    np.maximum.at(row_KH, (basins.basin[some_N], basins.row[some_N]), basins.peak[some_N])
    for number, (first, end) in enumerate(basins.of_maps):
        value_HW, basin_HW = basins.pixels_of(number)
        if end - first > FEW:
            y, x = np.nonzero(basin_HW[:height, :width] >= 0)
            np.maximum.at(column_KW, (basin_HW[y, x], x), value_HW[y, x])
            continue
        for basin in range(first, end):
            x0, y0, x1, y1 = basins.regions[basin]
            mask_hw = (basin_HW[y0:y1, x0:x1] == basin).view(np.uint8)
            column_KW[basin, x0:x1] = (value_HW[y0:y1, x0:x1] * mask_hw).max(0)
    _span(column_KW, table_K4L[:, 0], table_K4L[:, 2])
    _span(row_KH, table_K4L[:, 1], table_K4L[:, 3])
    return table_K4L


def _span(most_KX: Bytes, start_KL: NDArray[np.int32], end_KL: NDArray[np.int32]) -> None:
    """Set the first of the X lines that has a pixel above each level, and minus the one after the last."""
    basins, lines = most_KX.shape
    offset_K1 = 256 * np.arange(basins)[:, None]
    for lines_KX, span_KL, shift in ((most_KX, start_KL, 0), (most_KX[:, ::-1], end_KL, lines)):
        climbed_KX = np.maximum.accumulate(lines_KX, 1) + offset_K1
        below_KV = np.bincount(climbed_KX.reshape(-1), minlength=256 * basins).reshape(basins, 256).cumsum(1)
        span_KL[:] = below_KV[:, :LEVELS] - shift
