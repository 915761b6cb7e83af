"""The pointing game and the energy pointing game: where a map's maximum, and its energy, lie.

All boxes are half-open, pixels of the upright original.
Shape suffixes: h w a map's grid, Y X pixels of the original.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.maps.frame import Laid, over_frame
from saltern.pipeline.metrics.localization.boxes import area, clipped, disjoint
from saltern.schemas.saliency import Box

TOLERANCE = 15  # pixels of the original
_EQUAL = 1e-6  # of the map's range; values that differ by less are equal, as resampling rounds


def highest_point(
    map_hw: NDArray[np.float32], input_shape: tuple[int, int], geometry: list[float], height: int, width: int
) -> tuple[int, int] | None:
    """Return the pixel x, y of the original where the map is largest; None if the input covers no pixel's centre.

    The map is resampled at the pixel centres (bilinear, `over_frame`). Of equal pixels the first in raster order
    counts, as argmax has it; so a constant map points to the first pixel of the crop.
    """
    map_YX = over_frame(map_hw, input_shape, geometry, height, width)
    if np.isnan(map_YX).all():
        return None
    low, high = np.nanmin(map_YX), np.nanmax(map_YX)
    y, x = divmod(int(np.flatnonzero(map_YX >= high - _EQUAL * (high - low))[0]), width)
    return x, y


def is_pointed_at(point: tuple[int, int] | None, true: Sequence[Box], height: int, width: int) -> bool:
    """Return whether the point is less than TOLERANCE pixels away from a pixel of a true box.

    Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016 (arXiv 1608.00507), as TorchRay counts:
    the distance is that of two pixels' centres, and boxes end at the image's edges.
    """
    if point is None:
        return False
    for x0, y0, x1, y1 in (clipped(box, height, width) for box in true):
        right, down = max(x0 - point[0], 0, point[0] - x1 + 1), max(y0 - point[1], 0, point[1] - y1 + 1)
        if x0 < x1 and y0 < y1 and right * right + down * down < TOLERANCE * TOLERANCE:
            return True
    return False


def is_difficult(true: Sequence[Box], distractors: int | None, height: int, width: int) -> bool | None:
    """Return whether a sample belongs to the difficult subset of the pointing game; None if it is not known.

    That is, the true boxes cover less than a quarter of the image, and it shows at least one other category (Zhang et
    al. 2016).

    Args:
        true: the true boxes.
        distractors: the number of other categories in the image (`Annotation.distractors`).
        height, width: of the image, pixels.
    """
    if distractors is None:
        return None
    covered = sum(area(box) for box in disjoint([clipped(box, height, width) for box in true]))
    return distractors > 0 and 4 * covered < height * width


def energy_inside(laid: Laid, true: Sequence[Box]) -> float:
    """Return the share of the map's sum that lies in the true boxes, in [0, 1]; 0 for a map of zeros.

    The energy-based pointing game of Wang et al., "Score-CAM", 2020 (arXiv 1910.01279), with the union of the boxes if
    there are several. Outside of the network's crop the map is 0.

    Args:
        laid: a map without negative values, such as `boxes.unit` scales it to [0, 1].
        true: the true boxes.
    """
    total = laid.sum(laid.frame)
    return sum(laid.sum(box) for box in disjoint(true)) / total if total > 0 else 0.0
