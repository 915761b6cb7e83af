"""Measure how well boxes and maps agree with the true boxes of one sample.

All boxes are x0, y0, x1, y1, half-open, pixels of the upright original. Of several true boxes the best counts.
Shape suffixes: h w a map's grid.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.maps.frame import Laid
from saltern.schemas.saliency import Box


def area(box: Box) -> int:
    """Return the number of pixels in the box."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def clipped(box: Box, height: int, width: int) -> Box:
    """Return the part of the box inside the image; a box without pixels if there is none."""
    x0, y0, x1, y1 = box
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


def overlap(one: Box, other: Box) -> int:
    """Return the number of pixels in both boxes."""
    return area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))


def iou(found: Box, true: Sequence[Box]) -> float:
    """Return the largest intersection over union with a true box, in [0, 1]."""
    return max((_iou(found, box) for box in true), default=0.0)


def _iou(one: Box, other: Box) -> float:
    common = overlap(one, other)
    union = area(one) + area(other) - common
    # Division of whole numbers below 2^53 is rounded to the nearest float, so exactly one half stays one half.
    return common / union if union else 0.0


def is_hit(found: Sequence[Box], true: Sequence[Box]) -> bool:
    """Return whether a found box has an IoU of more than one half with a true one. LE = 1 - hit (CASM, section 5.1)."""
    return any(iou(box, true) > 0.5 for box in found)


def box_f1(found: Box, true: Sequence[Box]) -> float:
    """Return the continuous F1, in [0, 1], of the map that is 1 in the box and 0 outside of it."""
    return max((2 * overlap(found, box) / (area(found) + area(box)) for box in true), default=0.0)


def disjoint(boxes: Sequence[Box]) -> list[Box]:
    """Split the union of boxes into boxes that share no pixel."""
    parts: list[Box] = []
    for y0, y1 in pairwise(sorted({edge for box in boxes for edge in (box[1], box[3])})):
        spans = sorted((box[0], box[2]) for box in boxes if box[1] <= y0 and y1 <= box[3])
        end = spans[0][0] if spans else 0
        for x0, x1 in spans:
            parts += [(max(x0, end), y0, x1, y1)] if x1 > end else []
            end = max(end, x1)
    return parts


def mask_iou(laid: Laid, true: Sequence[Box]) -> float:
    """Return the IoU, in [0, 1], of a mask that is laid over the original and all true boxes, filled."""
    _, _, width, height = laid.frame
    parts = [box for box in disjoint([clipped(box, height, width) for box in true]) if area(box)]
    common, filled = sum(map(laid.sum, parts)), sum(map(area, parts))
    union = laid.sum(laid.frame) + filled - common
    return common / union if union else 0.0


def covered(found: Box, true: Sequence[Box]) -> float:
    """Return the IoU, in [0, 1], of a box and all true boxes, filled."""
    parts = disjoint(true)
    common = sum(overlap(found, box) for box in parts)
    return common / (area(found) + sum(map(area, parts)) - common)


def map_f1(laid: Laid, true: Sequence[Box]) -> float:
    """Return the continuous F1, in [0, 1], of a map m in [0, 1] that is laid over the original.

    inside = sum of m in the box, P = inside / sum of m, R = inside / area of the box: 2PR / (P + R), which is
    2 inside / (sum of m + area), so that a map of zeros has 0.
    """
    total = laid.sum(laid.frame)
    return max((2 * laid.sum(box) / (total + area(box)) for box in true), default=0.0)


def centre_box(height: int, width: int, share: float = 0.5) -> Box:
    """Return the centred box of the image's shape with this share of its area, edges rounded to whole pixels.

    Opposite edges are rounded by the same amount: half of 64 x 64 gives 9, 9, 55, 55, which is 0.52 of it.
    """
    margin = (1 - math.sqrt(share)) / 2
    # At least one pixel remains after rounding.
    left, top = min(round(margin * width), (width - 1) // 2), min(round(margin * height), (height - 1) // 2)
    return left, top, width - left, height - top


def unit(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a map to [0, 1] from its smallest to its largest value; zeros if it is constant."""
    lo, hi = np.float64(map_hw.min()), np.float64(map_hw.max())
    scaled: NDArray[np.float32] = ((map_hw - lo) / (hi - lo if hi > lo else 1)).astype(np.float32)
    return scaled
