"""Find the boxes of a batch of masks.

Works on runs, the spans of ones in the rows: they are few, and numpy releases the GIL in the steps on all bits.
Shape suffixes: B batch, H W the network's input, S bytes of a packed row, R runs, E pairs of runs that touch.
"""

import numpy as np
from numpy.typing import NDArray

_LOW, _HIGH = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)  # bits of each byte
_TOGETHER, _MANY = 128, 2**18  # masks, and their runs; a mask of noise has 25,000 runs of 224 x 224 pixels


def largest_boxes(packed_BHS: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the tight box of the largest 4-connected component of each mask.

    Args:
        packed_BHS: the bits of each row, the first pixel highest, filled up with zeros, as numpy packs them.

    Returns:
        (B, 4): x0, y0, x1, y1 in pixels, half-open; zeros for an empty mask. Of equally large components, the first in
        raster order counts.
    """
    parts = [_boxes(packed_BHS[start : start + _TOGETHER]) for start in range(0, len(packed_BHS), _TOGETHER)]
    return np.concatenate(parts) if parts else np.zeros((0, 4), np.int64)


def _boxes(packed_BHS: NDArray[np.uint8]) -> NDArray[np.int64]:
    batch, height, packed = packed_BHS.shape
    row = 8 * (packed + 1)  # bits from a pixel to the one below it
    start_R, end_R = _runs(packed_BHS)
    if len(start_R) > _MANY and batch > 1:  # less memory, which is in the caches
        return np.concatenate([_boxes(packed_BHS[: batch // 2]), _boxes(packed_BHS[batch // 2 :])])
    line_R = start_R // row  # numpy divides by a scalar several times as fast as its divmod does
    mask_R = line_R // (height + 1)
    size_R = end_R - start_R
    component_R = _components(start_R, end_R, row)
    area_R = np.bincount(component_R, size_R, len(size_R))  # of a component, at its first run
    first = np.flatnonzero(area_R != 0)
    # The largest of each mask, the first of equals.
    order = first[np.lexsort((first, -area_R[first], mask_R[first]))]
    found, at = np.unique(mask_R[order], return_index=True)
    largest_B = np.full(batch, -1)
    largest_B[found] = order[at]
    chosen = np.flatnonzero(component_R == largest_B[mask_R])
    boxes_B4 = np.zeros((batch, 4), np.int64)
    if len(chosen):
        begin = np.searchsorted(mask_R[chosen], found)
        line_R, size_R = line_R[chosen], size_R[chosen]
        x_R, y_R = start_R[chosen] - line_R * row, line_R - mask_R[chosen] * (height + 1)
        edges = (np.minimum, x_R), (np.minimum, y_R), (np.maximum, x_R + size_R), (np.maximum, y_R + 1)
        boxes_B4[found] = np.stack([function.reduceat(values, begin) for function, values in edges], 1)
    return boxes_B4


def _runs(packed_BHS: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bits where runs start and end, in the rows of all masks together.

    A byte of zeros follows each row, and a row of zeros each mask, so that no run continues into the next.
    """
    batch, height, packed = packed_BHS.shape
    count = batch * (height + 1) * (packed + 1)
    bits = np.zeros(count + -count % 8, np.uint8)
    bits[:count].reshape(batch, height + 1, packed + 1)[:, :height, :packed] = packed_BHS
    words = bits.view(np.uint64)  # numpy shifts eight bytes as fast as one
    before: NDArray[np.uint8] = (words >> 1 & _LOW).view(np.uint8)
    before[1:] |= (words << 7 & _HIGH).view(np.uint8)[:-1]
    edges = bits ^ before  # bits that differ from the one before them
    some = np.flatnonzero(edges != 0)  # numpy finds True four times as fast as other numbers
    found = np.flatnonzero(np.unpackbits(edges[some]).view(np.bool_))
    at = 8 * some[found >> 3] + (found & 7)
    return np.ascontiguousarray(at[::2]), np.ascontiguousarray(at[1::2])


def _components(start_R: NDArray[np.int64], end_R: NDArray[np.int64], row: int) -> NDArray[np.int64]:
    """Return the first run of each run's component. Runs touch if they share a column in adjacent rows.

    Args:
        start_R, end_R: of the runs in all rows together, in order.
        row: distance of a pixel to the one below it.
    """
    runs = np.arange(len(start_R))
    low_R = np.searchsorted(end_R, start_R - row, "right")  # the first run above that can touch, or a later one
    over_R = end_R - row
    parent_R = _roots(np.where(start_R[low_R] < over_R, low_R, runs))
    # Most runs touch one run above, at most. The others join the trees of those that they touch.
    several = np.flatnonzero(start_R[low_R + 1 - (low_R == runs)] < over_R)
    first_S = low_R[several] + 1
    more_S = np.searchsorted(start_R, over_R[several], "left") - first_S
    below_E = np.repeat(several, more_S)
    above_E = np.arange(len(below_E)) + np.repeat(first_S - np.cumsum(more_S) + more_S, more_S)
    while len(below_E):
        one_E, other_E = parent_R[below_E], parent_R[above_E]
        apart = one_E != other_E
        below_E, above_E, one_E, other_E = below_E[apart], above_E[apart], one_E[apart], other_E[apart]
        np.minimum.at(parent_R, np.maximum(one_E, other_E), np.minimum(one_E, other_E))
        parent_R = _roots(parent_R)
    return parent_R


def _roots(parent_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the root of each run's tree. No parent comes after its child."""
    while True:
        above_R = parent_R[parent_R]
        if np.array_equal(above_R, parent_R):
            return parent_R
        parent_R = above_R
