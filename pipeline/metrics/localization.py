"""How well boxes and maps agree with true boxes, on one sample; pure functions.

All boxes are x0, y0, x1, y1, half-open, pixels of the upright original. Of several true boxes the best counts.
Shape suffixes: Y X the original, h w a map's own grid.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.maps.frame import Laid
from saltern.schemas.saliency import Box


def area(box: Box) -> int:
    """Pixels in the box."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def overlap(one: Box, other: Box) -> int:
    """Pixels in both boxes."""
    return area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))


def iou(found: Box, true: Sequence[Box]) -> float:
    """Largest intersection over union with a true box, in [0, 1]."""
    return max((_iou(found, box) for box in true), default=0.0)


def _iou(one: Box, other: Box) -> float:
    common = overlap(one, other)
    union = area(one) + area(other) - common
    # Float division of whole numbers below 2^53 rounds the nearest way, so that exactly one half stays one half.
    return common / union if union else 0.0


def is_hit(found: Sequence[Box], true: Sequence[Box]) -> bool:
    """Whether a found box has an IoU of more than one half with a true one. LE = 1 - hit (CASM, section 5.1)."""
    return any(iou(box, true) > 0.5 for box in found)


def box_f1(found: Box, true: Sequence[Box]) -> float:
    """Continuous F1 of the map that is 1 in the box and 0 outside of it, in [0, 1]."""
    return max((2 * overlap(found, box) / (area(found) + area(box)) for box in true), default=0.0)


def map_f1(laid: "Laid", true: Sequence[Box]) -> float:
    """Continuous F1, in [0, 1], of a map m in [0, 1] that is laid over the original.

    inside = sum of m in the box, P = inside / sum of m, R = inside / area of the box: 2PR / (P + R), which is
    2 inside / (sum of m + area), so that a map of zeros has 0.
    """
    total = laid.sum(laid.frame)
    return max((2 * laid.sum(box) / (total + area(box)) for box in true), default=0.0)


def centre_box(height: int, width: int, share: float = 0.5) -> Box:
    """The box of the image's shape in its middle with this share of its area, edges rounded to whole pixels.

    The rounding is outward or inward, the same on both sides: half of 64 x 64 gives 9, 9, 55, 55, which is 0.52 of it.
    """
    margin = (1 - math.sqrt(share)) / 2
    # At least one pixel is left, whatever the rounding.
    left, top = min(round(margin * width), (width - 1) // 2), min(round(margin * height), (height - 1) // 2)
    return left, top, width - left, height - top


def unit(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map scaled to [0, 1] from its least to its largest value; zeros where it is constant."""
    lo, hi = np.float64(map_hw.min()), np.float64(map_hw.max())
    scaled: NDArray[np.float32] = ((map_hw - lo) / (hi - lo if hi > lo else 1)).astype(np.float32)
    return scaled
