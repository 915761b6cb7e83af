"""The localization metrics of clovaai/wsolevaluation, by loops over thresholds, boxes and pixels.

Follows its evaluation.py (MIT licence) step by step: the same calls of OpenCV with the same arguments.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from saltern.schemas.saliency import Box

THRESHOLDS = [float(each) for each in np.arange(0, 1, 0.001)]


def normalised(map_hw: Any) -> Any:
    """Return normalize_scoremap's result: double precision, in [0, 1], zeros if constant."""
    cam = map_hw.astype(np.float64)
    if np.isnan(cam).any() or cam.min() == cam.max():
        return np.zeros_like(cam)
    cam -= cam.min()
    cam /= cam.max()
    return cam


def found_boxes(scoremap: Any, threshold: float, *, every: bool) -> list[list[int]]:
    """Return the inclusive boxes of all contours at a threshold, or of the largest contour."""
    height, width = scoremap.shape
    image = np.expand_dims((scoremap * 255).astype(np.uint8), 2)
    thresh = int(threshold * np.max(image))
    cut = cv2.threshold(src=image, thresh=thresh, maxval=255, type=cv2.THRESH_BINARY)[1]
    contours = cv2.findContours(image=cut, mode=cv2.RETR_TREE, method=cv2.CHAIN_APPROX_SIMPLE)[0]
    if len(contours) == 0:
        return [[0, 0, 0, 0]]
    if not every:
        contours = [max(contours, key=cv2.contourArea)]
    boxes = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
    return boxes


def inclusive_iou(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the IoU of two inclusive boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    common = max(0, width) * max(0, height)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return common / (sum(areas) - common)


def naive_hits(map_HW: Any, true: Sequence[Box], thresholds: Sequence[float] = THRESHOLDS) -> list[list[bool]]:
    """Return the hits of MaxBoxAcc, and of MaxBoxAccV2 at IoU .3, .5 and .7, at each threshold."""
    scoremap = normalised(map_HW)
    given = [(x0, y0, x1 - 1, y1 - 1) for x0, y0, x1, y1 in true]
    hits: list[list[bool]] = [[], [], [], []]
    for threshold in thresholds:
        one, every = (
            max(inclusive_iou(box, other) for box in found_boxes(scoremap, threshold, every=every) for other in given)
            for every in (False, True)
        )
        for into, best, least in zip(hits, (one, every, every, every), (50, 30, 50, 70), strict=True):
            into.append(best >= least / 100)
    return hits


def naive_pxap(maps: Sequence[Any], masks: Sequence[Any]) -> float:
    """Return PxAP as MaskEvaluator computes it, in [0, 1]; masks have 1 foreground, 0 background, 255 ignored."""
    edges = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])
    true = false = np.zeros(len(edges) - 1)
    for map_HW, mask_HW in zip(maps, masks, strict=True):
        scoremap = normalised(map_HW)
        true = true + np.histogram(scoremap[mask_HW == 1], bins=edges)[0]
        false = false + np.histogram(scoremap[mask_HW == 0], bins=edges)[0]
    tp, fp = true[::-1].cumsum(), false[::-1].cumsum()
    there = (tp + fp) != 0
    area = 0.0
    for at in range(1, len(tp)):
        if there[at]:
            area += tp[at] / (tp[at] + fp[at]) * (tp[at] - tp[at - 1]) / tp[-1]
    return area


def naive_pointing(map_YX: Any, boxes: Sequence[Box], tolerance: int = 15) -> bool:
    """Return the result of TorchRay's PointingGame.evaluate for the map's first largest pixel."""
    height, width = map_YX.shape
    mask = np.zeros(map_YX.shape, bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    y, x = np.unravel_index(map_YX.argmax(), map_YX.shape)
    v, u = np.meshgrid((np.arange(height) - y) ** 2, (np.arange(width) - x) ** 2, indexing="ij")
    return bool((mask & ((v + u) < tolerance**2)).any())
