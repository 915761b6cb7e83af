"""MaxBoxAcc and MaxBoxAccV2 of samples: at which thresholds a map's boxes hit the true ones.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020 (arXiv 2001.07437), with the
conventions of the authors' code, clovaai/wsolevaluation. Its 1,000 thresholds 0, .001, ... cut a map at the level
int(threshold * 255) of 255, so that 255 bits hold a sample's hits at all of them.
Shape suffixes: B maps, h w a map's grid, H W the network's input, R boxes at one level, S bytes of packed bits.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.maps.frame import to_original
from saltern.pipeline.metrics.localization.areas import areas_of
from saltern.pipeline.metrics.localization.basins import Basins, bright_and_dark
from saltern.pipeline.metrics.localization.levels import LEVELS, Parts, holes_of, parts_of
from saltern.schemas.saliency import Box

IOUS = (0.5, 0.3, 0.5, 0.7)  # the least IoU of a hit: of MaxBoxAcc, and the three of MaxBoxAccV2
BYTES = -(-LEVELS // 8)
_LARGER = np.array([0, 0, 1, 1])  # from a tight box, half-open, to that of clovaai
_OUTLINE = np.array([-1, -1, 2, 2])  # likewise from the box of a hole, which the outline lies around
_PIXELS = 2**20  # of the maps that are in memory together
_MANY = 4096  # basins; the tables of more are not made for several maps together
_Ints = NDArray[np.int64]


def box_hits(
    map_Bhw: NDArray[np.float32],
    input_shape: tuple[int, int],
    geometry_B4: NDArray[np.float64],
    size_B2: NDArray[np.int32],
    true: Sequence[Sequence[Box]],
) -> NDArray[np.uint8]:
    """Return at which levels the boxes of each map hit a true box.

    A map is resampled to the network's input (`upsample`), scaled to [0, 1] by its smallest and largest value, and cut
    to 8 bits, (map * 255) rounded down. At level t = 0 to 254, the contours of the pixels above t are found
    (8-connected, cv2.findContours with RETR_TREE, so the outlines of holes count too). MaxBoxAcc takes the box of the
    contour with the largest cv2.contourArea, the first of equals; MaxBoxAccV2 takes the boxes of all.

    A box reaches one pixel further to the right and to the bottom than its contour, except at the input's edge: this is
    clovaai's convention. It is carried from the input to the original by `to_original`, so its edges are rounded to
    whole pixels and cut at the image's edges, and compared there. IoU counts whole pixels (+1 for inclusive edges); a
    hit is IoU >= 0.5 (MaxBoxAcc), or 0.3, 0.5 and 0.7 (V2), with the best true box. If the original is the input, the
    hits equal clovaai's. A constant map, or one that is not finite, has the box of the first pixel of the input.

    Clovaai compares at 224 x 224 pixels to which the image was squashed, with true boxes rounded down: a difference of
    a pixel.

    Args:
        map_Bhw: of any grid.
        input_shape: height and width of the network's input, pixels.
        geometry_B4, size_B2: as for `to_original`.
        true: at least one box of each sample, half-open, pixels of the original.

    Returns:
        (B, 4, BYTES) packed bits, as numpy packs them: rows as IOUS, bit t is the hit at level t.
    """
    together = max(1, _PIXELS // (input_shape[0] * input_shape[1]))
    hits = np.zeros((len(map_Bhw), len(IOUS), BYTES), np.uint8)
    for start in range(0, len(map_Bhw), together):
        part = slice(start, start + together)
        map_BHW = upsample(torch.from_numpy(map_Bhw[part].astype(np.float32)), input_shape).numpy()
        hits[part] = _hits(eight_bits(map_BHW), geometry_B4[part], size_B2[part], true[part])
    return hits


def unit_map(map_HW: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale a map to [0, 1] from its smallest to its largest value, in double precision as clovaai does.

    A map that is constant or not finite becomes zeros.
    """
    low, high = np.float64(map_HW.min()), np.float64(map_HW.max())
    if not low < high or np.isinf(low) or np.isinf(high):
        return np.zeros(map_HW.shape)
    unit_HW: NDArray[np.float64] = map_HW - low
    unit_HW /= high - low
    return unit_HW


def eight_bits(map_BHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale maps to 0..255 as `unit_map` does, rounded down."""
    levels_BHW = np.empty(map_BHW.shape, np.uint8)
    for levels_HW, map_HW in zip(levels_BHW, map_BHW, strict=True):
        unit_HW = unit_map(map_HW)
        unit_HW *= 255
        levels_HW[:] = unit_HW
    return levels_BHW


def _hits(
    map_BHW: NDArray[np.uint8],
    geometry_B4: NDArray[np.float64],
    size_B2: NDArray[np.int32],
    true: Sequence[Sequence[Box]],
) -> NDArray[np.uint8]:
    batch, height, width = map_BHW.shape
    bright, dark = bright_and_dark(map_BHW)
    if batch > 1 and len(bright.top) + len(dark.top) > _MANY:
        each = (slice(number, number + 1) for number in range(batch))
        return np.concatenate([_hits(map_BHW[at], geometry_B4[at], size_B2[at], true[at]) for at in each])
    parts, holes, flat = parts_of(bright), holes_of(dark), _of_flat_maps(map_BHW)
    box_R4 = np.concatenate([parts.box + _LARGER, holes.box + _OUTLINE, flat.box])
    key_R = np.concatenate([each.map * LEVELS + each.level for each in (parts, holes, flat)])

    def ious(box_R4: _Ints, map_R: _Ints) -> NDArray[np.float64]:
        box_R4[:, 2:] = np.minimum(box_R4[:, 2:], [width, height])
        return _best_iou(to_original(box_R4, geometry_B4[map_R], size_B2[map_R]), map_R, true)

    iou_R = ious(box_R4, key_R // LEVELS)
    best, worst = np.zeros((len(IOUS), batch * LEVELS)), np.ones(batch * LEVELS)
    np.maximum.at(best[1], key_R, iou_R)
    np.minimum.at(worst, key_R, iou_R)
    best[:] = best[1]
    # Only if some boxes of a level hit and others do not, it matters which contour is the largest.
    doubt = (best[1] >= IOUS[0]) & (worst < IOUS[0])
    if doubt.any():
        largest, open_key = _largest(bright, parts, key_R, doubt)
        best[0, key_R[largest]] = iou_R[largest]
        again = [_largest_contour(map_BHW[key // LEVELS], key % LEVELS) for key in open_key.tolist()]
        best[0, open_key] = ious(np.array(again, np.int64).reshape(-1, 4), open_key // LEVELS)
    hit = best >= np.array(IOUS)[:, None]
    return np.packbits(hit.reshape(len(IOUS), batch, LEVELS).swapaxes(0, 1), axis=2)


def _of_flat_maps(map_BHW: NDArray[np.uint8]) -> Parts:
    """Return the box of the first pixel, at each level, for the maps without any contour."""
    flat = np.flatnonzero(map_BHW.max((1, 2)) == 0)
    rows = len(flat) * LEVELS
    box_R4 = np.tile([0, 0, 1, 1], (rows, 1))
    return Parts(np.repeat(flat, LEVELS), np.tile(np.arange(LEVELS), len(flat)), box_R4)


def _largest(bright: Basins, parts: Parts, key_R: _Ints, doubt: NDArray[np.bool_]) -> tuple[_Ints, _Ints]:
    """Return which rows are the largest contours, and the keys (map and level) where this must be looked up.

    A contour's area is that of its part with the holes filled: at least `areas_of`, at most the polygon of its box.

    Args:
        bright, parts: basins and their parts.
        key_R: the keys of all rows, those of the parts first.
        doubt: the keys that are asked about.
    """
    some_B = np.logical_or.reduce(doubt.reshape(-1, LEVELS), 1)
    row_P, area_P = np.flatnonzero(some_B[parts.map]), areas_of(bright, some_B)
    asked_P = doubt[key_R[row_P]]
    row_P, area_P = row_P[asked_P], area_P[asked_P]
    key_P, least = key_R[row_P], np.zeros(len(doubt))
    np.maximum.at(least, key_P, area_P)
    has_hole = np.zeros(len(doubt), np.bool_)
    has_hole[key_R[len(parts.map) :]] = True
    side_P2 = parts.box[row_P, 2:] - parts.box[row_P, :2] - 1
    most_P = np.where(has_hole[key_P], side_P2[:, 0] * side_P2[:, 1], area_P)
    may_P = np.flatnonzero(most_P >= least[key_P])
    count = np.bincount(key_P[may_P], minlength=len(doubt))
    # A part without any area may be a ring of the same area as its hole.
    is_open = doubt & ((count > 1) | (has_hole & (least == 0)))
    return row_P[may_P[~is_open[key_P[may_P]]]], np.flatnonzero(is_open)


def _largest_contour(map_HW: NDArray[np.uint8], level: int) -> Box:
    """Return the box of the largest contour, half-open and one pixel larger; of equals, the first that OpenCV gives."""
    mask_HW = cv2.threshold(map_HW, level, 255, cv2.THRESH_BINARY)[1]
    contours = cv2.findContours(mask_HW, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    x, y, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
    return x, y, x + width + 1, y + height + 1


def _best_iou(box_R4: _Ints, map_R: _Ints, true: Sequence[Sequence[Box]]) -> NDArray[np.float64]:
    """Return the largest IoU of each box with a true box of its map."""
    count_B = np.array([len(boxes) for boxes in true])
    true_BG4 = np.zeros((len(true), count_B.max(initial=0), 4), np.int64)
    for into_G4, boxes in zip(true_BG4, true, strict=True):
        into_G4[: len(boxes)] = boxes
    area_R = (box_R4[:, 2] - box_R4[:, 0]) * (box_R4[:, 3] - box_R4[:, 1])
    best_R = np.zeros(len(box_R4))
    for number, true_B4 in enumerate(true_BG4.swapaxes(0, 1)):
        some_R = np.flatnonzero(count_B[map_R] > number) if number else slice(None)
        found_4R, true_4R = box_R4[some_R].T, true_B4[map_R[some_R]].T
        side_2R = np.minimum(found_4R[2:], true_4R[2:]) - np.maximum(found_4R[:2], true_4R[:2])
        common_R = side_2R[0].clip(0) * side_2R[1].clip(0)
        true_R = (true_4R[2] - true_4R[0]) * (true_4R[3] - true_4R[1])
        iou_R = common_R / (area_R[some_R] + true_R - common_R)
        best_R[some_R] = np.maximum(best_R[some_R], iou_R)
    return best_R
