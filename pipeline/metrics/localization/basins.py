"""Divide 8-bit maps into basins, and find the passes between them.

A basin is one regional maximum with the pixels that climb to it, so its pixels above any level are connected. Two
basins are connected at the levels below the height of the best pass between them: the largest value that all pixels of
a path from one to the other reach. (The max-tree of Salembier et al. 1998, without its nodes of one pixel.)
Shape suffixes: B maps, H W pixels, P pixels of all maps with their margins, N nodes, E edges, K basins.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Labels = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Basins:
    """The basins of a batch of maps, and the passes between them."""

    value: Bytes  # (P)
    shape: tuple[int, int, int]  # B, H, W
    start: Ints  # (N) first pixel of a node, which is a piece of a row whose values rise and then fall
    peak: Bytes  # (N) its largest value
    basin: Ints  # (N) its basin; -1 for the margin
    map: Ints  # (K)
    top: Bytes  # (K) the basin's largest value
    passes: Ints  # (E, 2) two basins, or -1 for the margin; by falling height, one for each pair
    height: Bytes  # (E) of the best pass between them

    @cached_property
    def length(self) -> Ints:
        """The number of pixels of each node (N)."""
        return np.diff(self.start, append=len(self.value))

    @cached_property
    def row(self) -> Ints:
        """The row of its map that each node lies in (N). A node starts where its values begin to rise."""
        _, height, width = self.shape
        return (self.start - width - 1) // (width + 1) % (height + 1)

    @cached_property
    def of_maps(self) -> list[tuple[int, int]]:
        """The first basin of each map, and the one after its last."""
        return list(itertools.pairwise(np.searchsorted(self.map, np.arange(self.shape[0] + 1)).tolist()))

    @cached_property
    def regions(self) -> list[list[int]]:
        """A box round the pixels of each basin: x0, y0, x1, y1, half-open."""
        _, height, width = self.shape
        some_N = np.flatnonzero(self.basin >= 0)
        basin_N, y_N, x0_N = self.basin[some_N], self.row[some_N], (self.start[some_N] - width - 1) % (width + 1)
        x1_N = np.minimum(x0_N + self.length[some_N], width)
        region_4K = np.repeat([[width], [height], [0], [0]], len(self.top), 1)
        for edge_K, edge_N in zip(region_4K[:2], (x0_N, y_N), strict=True):
            np.minimum.at(edge_K, basin_N, edge_N)
        for edge_K, edge_N in zip(region_4K[2:], (x1_N, y_N + 1), strict=True):
            np.maximum.at(edge_K, basin_N, edge_N)
        regions: list[list[int]] = region_4K.T.tolist()
        return regions

    def pixels_of(self, number: int) -> tuple[Bytes, Labels]:
        """Return value and basin of each pixel of a map, with the margins below and to the right (H + 1, W + 1)."""
        _, height, width = self.shape
        start = (width + 1) * (1 + number * (height + 1))
        part = slice(start, start + (height + 1) * (width + 1))
        return self.value[part].reshape(height + 1, -1), self._basin_of_pixel[part].reshape(height + 1, -1)

    @cached_property
    def _basin_of_pixel(self) -> Labels:
        """The basin of each pixel (P), in the smallest type that holds them."""
        return np.repeat(self.basin.astype(np.min_scalar_type(-max(len(self.top), 1))), self.length)


def bright_and_dark(map_BHW: Bytes) -> tuple[Basins, Basins]:
    """Return the basins of maps with 8-connected pixels, and those of 255 - map with 4-connected pixels.

    Each map gets a margin of one pixel, 0 and 255 - 0. So the second basins of the margin are connected to an edge.
    """
    batch, height, width = map_BHW.shape
    margins_PP = np.zeros((batch * (height + 1) + 1, width + 1), np.uint8)  # the next map or row has the other margin
    margins_PP[1:, :width].reshape(batch, height + 1, width)[:, :height] = map_BHW
    value_P, shape = margins_PP.reshape(-1), (batch, height, width)
    rise_N, fall_N = _turns(value_P)
    return _find(value_P, shape, rise_N, diagonal=True), _find(255 - value_P, shape, fall_N, diagonal=False)


def _find(value_P: Bytes, shape: tuple[int, int, int], start_N: Ints, *, diagonal: bool) -> Basins:
    _, height, width = shape
    peak_N = np.maximum.reduceat(value_P, start_N)
    ends_E2, height_E = _edges(value_P, start_N, width + 1, diagonal)
    root_N = _climb(peak_N, ends_E2, height_E)
    root_K = np.flatnonzero((root_N == np.arange(len(root_N))) & (root_N != root_N[0]))  # the first node is the margin
    rank_N = np.full(len(root_N), -1)
    rank_N[root_K] = np.arange(len(root_K))
    basin_N = rank_N[root_N]
    pass_E2, height_E = _passes(basin_N[ends_E2], height_E, len(root_K))
    map_K = (start_N[root_K] // (width + 1) - 1) // (height + 1)
    return Basins(value_P, shape, start_N, peak_N, basin_N, map_K, peak_N[root_K], pass_E2, height_E)


def _turns(value_P: Bytes) -> tuple[Ints, Ints]:
    """Return where the values begin to rise after a fall, and where they begin to fall after a rise.

    These are the first pixels that differ from those before them. The values before the first pixel count as fallen.
    """
    rise, fall = value_P[1:] > value_P[:-1], value_P[1:] < value_P[:-1]
    level = ~(rise | fall)
    # Runs of level pixels; the first of them has no change before it, the last none after it.
    level_from = np.flatnonzero(~level[:-1] & level[1:])
    level_to = np.flatnonzero(level[:-1] & ~level[1:])
    rises_to = rise[level_to + 1]
    fell_from = np.concatenate([[True], fall[level_from]])[: len(level_to)]
    found = []
    for sharp, slow in ((fall[:-1] & rise[1:], rises_to & fell_from), (rise[:-1] & fall[1:], ~rises_to & ~fell_from)):
        start_N = np.concatenate([[0], np.flatnonzero(sharp) + 2, level_to[slow] + 2])
        start_N.sort(kind="stable")
        found.append(start_N)
    return found[0], found[1]


def _edges(value_P: Bytes, start_N: Ints, stride: int, diagonal: bool) -> tuple[Ints, Bytes]:
    """Return pairs of nodes that have neighbouring pixels, and the height of the best pass of each pair.

    The height of a step is the smaller value of its two pixels. Passes of height 0 are left out.
    """
    nodes = np.arange(len(start_N) - 1)
    firsts, seconds = [nodes], [nodes + 1]
    heights = [value_P[start_N[1:] - 1]]  # in a row, the later node's first pixel is the higher one
    for offset in (stride - 1, stride, stride + 1) if diagonal else (stride,):
        below = start_N[np.searchsorted(start_N, offset, "right") :] - offset
        border = np.concatenate([start_N[: np.searchsorted(start_N, len(value_P) - offset)], below])
        border.sort(kind="stable")
        border = border[np.concatenate([[True], border[1:] > border[:-1]])]
        heights.append(np.maximum.reduceat(np.minimum(value_P[:-offset], value_P[offset:]), border))
        firsts.append(np.searchsorted(start_N, border, "right") - 1)
        seconds.append(np.searchsorted(start_N, border + offset, "right") - 1)
    height_E = np.concatenate(heights)
    there = np.flatnonzero(height_E)
    return np.stack([np.concatenate(firsts)[there], np.concatenate(seconds)[there]], 1), height_E[there]


def _climb(peak_N: Bytes, ends_E2: Ints, height_E: Bytes) -> Ints:
    """Return the last of the nodes that one climbs to from each, along passes as high as the peaks they start from."""
    order_N = peak_N.astype(np.int64) * len(peak_N) + np.arange(len(peak_N))  # no two are equal
    root_N = np.arange(len(peak_N))
    while True:
        next_N, joined = np.arange(len(peak_N)), 0
        for below_E, above_E in (ends_E2.T, ends_E2.T[::-1]):
            climbs = np.flatnonzero((height_E == peak_N[below_E]) & (order_N[below_E] < order_N[above_E]))
            next_N[below_E[climbs]] = above_E[climbs]
            joined += len(climbs)
        if not joined:
            return root_N
        # A plateau may have several last nodes, which the next round joins.
        next_N = _roots(next_N)
        root_N, ends_E2 = next_N[root_N], next_N[ends_E2]
        apart = np.flatnonzero(ends_E2[:, 0] != ends_E2[:, 1])
        ends_E2, height_E = ends_E2[apart], height_E[apart]


def _roots(parent_N: Ints) -> Ints:
    while True:
        above_N = parent_N[parent_N]
        if np.array_equal(above_N, parent_N):
            return parent_N
        parent_N = above_N


def _passes(basin_E2: Ints, height_E: Bytes, basins: int) -> tuple[Ints, Bytes]:
    """Return the highest pass of each pair of basins, by falling height."""
    apart = np.flatnonzero(basin_E2[:, 0] != basin_E2[:, 1])
    apart = apart[np.argsort(255 - height_E[apart], kind="stable")]
    pair_E = (basin_E2[apart].min(1) + 1) * (basins + 1) + basin_E2[apart].max(1)
    chosen = apart[np.sort(np.unique(pair_E, return_index=True)[1])]
    return basin_E2[chosen], height_E[chosen]
