"""Compute the metrics by slow loops over pixels, from their definitions."""

import json
import math
import random
from itertools import product
from typing import Any

import numpy as np
from made_run import CROP, SIZE

from saltern.pipeline.runs.reader import Row
from saltern.schemas.saliency import Box

HEIGHT, WIDTH = SIZE


def pixels(box: Box) -> set[tuple[int, int]]:
    return set(product(range(box[1], box[3]), range(box[0], box[2])))


def naive_iou(one: Box, other: Box) -> float:
    return len(pixels(one) & pixels(other)) / len(pixels(one) | pixels(other))


def naive_f1(map_YX: Any, true: list[Box]) -> float:
    """Return the best F1 over the true boxes, from precision and recall."""
    total = sum(float(value) for line in map_YX for value in line)
    best = 0.0
    for box in true:
        inside = sum(float(map_YX[y][x]) for y, x in pixels(box) if y < len(map_YX) and x < len(map_YX[0]))
        if inside > 0:
            precision, recall = inside / total, inside / len(pixels(box))
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def filled(box: Box | None, height: int = HEIGHT, width: int = WIDTH) -> Any:
    made = np.zeros((height, width))
    for y, x in pixels(box) if box else ():
        made[y, x] = 1
    return made


def naive_mask(row: Row) -> Any:
    """Return the mask in the original: each pixel has the mask's value at its centre."""
    mask_HW = row.mask()
    scale_x, scale_y, offset_x, offset_y = row.geometry
    made = np.zeros((row.image_height, row.image_width))
    for y, x in product(*map(range, made.shape)):
        row_at, column_at = math.floor((y + 0.5 - offset_y) / scale_y), math.floor((x + 0.5 - offset_x) / scale_x)
        if 0 <= row_at < CROP and 0 <= column_at < CROP:
            made[y, x] = mask_HW[row_at, column_at]
    return made


def some_box(draw: random.Random, height: int = HEIGHT, width: int = WIDTH) -> Box:
    (x0, x1), (y0, y1) = (sorted(draw.sample(range(side + 1), 2)) for side in (width, height))
    return x0, y0, x1, y1


def inclusive(*boxes: Box) -> bytes:
    return json.dumps(
        {"boxes": [[x0, y0, x1 - 1, y1 - 1] for x0, y0, x1, y1 in boxes], "height": HEIGHT, "width": WIDTH}
    ).encode()
