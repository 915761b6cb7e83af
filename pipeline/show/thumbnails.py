"""Draw small pictures of a row: the photograph, the map over it, the part inside the mask.

Shape suffixes: Y X a thumbnail of the whole upright original, h w a stored map's grid.
"""

import io
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.decode import DecodeError, decode_image
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.show.page import CROP, FOUND, GIVEN, DrawnBox, Picture

SIDE = 320  # longer side of a thumbnail, pixels
_TOP = 0.995  # quantile of a map that gets the brightest colour, so that one high pixel does not darken the map
_INK = (45, 226, 255)  # colour of the mask's outline, RGB
_CROWDED = 0.1  # largest share of a picture that an outline may cover
Pixels = NDArray[np.uint8]


def pictures(row: Row, sample: Sample | None, facts: Mapping[str, str]) -> list[Picture]:
    """Return the pictures of a row that can be drawn: photograph, map, mask."""
    photo_YX3 = photograph(row, sample)
    if photo_YX3 is None:
        return []
    given = given_boxes(sample, row)
    geometry = geometry_in(row, photo_YX3)
    if geometry is None:
        return [encode(photo_YX3, f"{row.key}: {row.status}", given)]
    crop, found = _crop(row, geometry, photo_YX3), found_boxes(row)
    class_ = facts["target"] or facts["label"]
    shown = [encode(photo_YX3, f"{row.key}, {class_}", [*given, *found])]
    if row.map_bytes is not None:
        shown.append(encode(_heat(row, photo_YX3, geometry), f"map of {row.key} for {class_}", crop))
    if row.mask_bytes is not None:
        words = f"mask of {row.key}: {facts['mask']} of the input, box {facts['box'] or 'none'}"
        shown.append(encode(_cut_out(row, photo_YX3, geometry), words, [*crop, *given, *found]))
    return shown


def overlay(row: Row, photo_YX3: Pixels, caption: str) -> Picture | None:
    """Return the row's map, or else its mask, over the photograph, with its box; None if it has neither."""
    geometry = geometry_in(row, photo_YX3)
    if geometry is None or (row.map_bytes is None and row.mask_bytes is None):
        return None
    draw = _heat if row.map_bytes is not None else _cut_out
    boxes = [*_crop(row, geometry, photo_YX3), *found_boxes(row)]
    return encode(draw(row, photo_YX3, geometry), f"{caption} of {row.key}", boxes, caption)


def photograph(row: Row, sample: Sample | None) -> Pixels | None:
    """Return the whole upright original, its longer side SIDE. Without it, return a grey field if its size is known."""
    if sample is not None and sample.image is not None:
        try:
            image = decode_image(sample.image)
        except DecodeError:
            return None
        return np.asarray(image.resize(_size(*image.size), Image.Resampling.BICUBIC, reducing_gap=3.0))
    if row.image_width is None or row.image_height is None:
        return None
    width, height = _size(row.image_width, row.image_height)
    return np.full((height, width, 3), 128, np.uint8)


def given_boxes(sample: Sample | None, row: Row) -> list[DrawnBox]:
    """Return the boxes in the sample's json member, where x0 y0 x1 y1 are inclusive original pixels."""
    boxes = [] if sample is None else extra(sample).get("boxes", [])
    try:
        ends = [[float(x0), float(y0), float(x1) + 1, float(y1) + 1] for x0, y0, x1, y1 in boxes]
    except (TypeError, ValueError, OverflowError):
        return []  # not a list of boxes
    return [_box(GIVEN, box, row) for box in ends if row.image_width and all(abs(end) < 2**31 for end in box)]


def found_boxes(row: Row) -> list[DrawnBox]:
    """Return the boxes of the row's mask."""
    return [_box(FOUND, box, row) for box in row.boxes or ()]


def encode(pixels_YX3: Pixels, words: str, boxes: Iterable[DrawnBox] = (), caption: str = "") -> Picture:
    """Return a picture for the page; `words` describe it for readers who do not see it."""
    stream = io.BytesIO()
    Image.fromarray(pixels_YX3).save(stream, "JPEG", quality=75)
    height, width = pixels_YX3.shape[:2]
    return Picture(stream.getvalue(), width, height, words, tuple(boxes), caption)


def geometry_in(row: Row, photo_YX3: Pixels) -> list[float] | None:
    """Return the geometry of the input in the thumbnail: scale x, scale y, offset x, offset y."""
    if row.geometry is None or row.image_width is None or row.image_height is None:
        return None
    scales = (photo_YX3.shape[1] / row.image_width, photo_YX3.shape[0] / row.image_height) * 2
    return [part * scale for part, scale in zip(row.geometry, scales, strict=True)]


def _size(width: int, height: int) -> tuple[int, int]:
    scale = SIDE / max(width, height)
    return max(1, round(scale * width)), max(1, round(scale * height))


def _box(kind: str, box: Sequence[float], row: Row) -> DrawnBox:
    width, height = row.image_width or 1, row.image_height or 1
    return DrawnBox(kind, box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def _crop(row: Row, geometry: list[float], photo_YX3: Pixels) -> list[DrawnBox]:
    """Return the part of the original that the network saw; [] if it saw all."""
    (height, width), input_shape = photo_YX3.shape[:2], row.layout.input_shape
    scale_x, scale_y, x0, y0 = geometry
    x1, y1 = x0 + scale_x * input_shape[1], y0 + scale_y * input_shape[0]
    whole = x0 < 1 and y0 < 1 and x1 > width - 1 and y1 > height - 1
    return [] if whole else [DrawnBox(CROP, x0 / width, y0 / height, x1 / width, y1 / height)]


def _heat(row: Row, photo_YX3: Pixels, geometry: list[float]) -> Pixels:
    """Draw the map's colours over the photograph, which is dim outside of the map."""
    heat_YX = over_frame(_unit(row.map()), row.layout.input_shape, geometry, *photo_YX3.shape[:2])
    seen_YX1 = np.isfinite(heat_YX)[..., None]
    levels = (np.nan_to_num(heat_YX) * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    return np.where(seen_YX1, 0.4 * photo_YX3 + 0.6 * colours, 0.3 * photo_YX3).round().astype(np.uint8)


def _cut_out(row: Row, photo_YX3: Pixels, geometry: list[float]) -> Pixels:
    """Dim the photograph outside of the mask. Draw the mask's outline unless it would cover the picture."""
    share_YX = over_frame(row.mask().astype(np.float32), row.layout.input_shape, geometry, *photo_YX3.shape[:2])
    mask_YX = share_YX >= 0.5
    picture_YX3 = np.where(mask_YX[..., None], photo_YX3, 0.3 * photo_YX3).round().astype(np.uint8)
    inner = cv2.erode(mask_YX.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1).astype(bool)
    outline = mask_YX & ~inner
    if outline.mean() < _CROWDED:
        picture_YX3[outline] = _INK
    return picture_YX3


def _unit(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a map to [0, 1], from its minimum (of a signed map from 0) to its _TOP quantile."""
    lo, hi = float(map_hw.min()), float(np.quantile(map_hw, _TOP))
    hi = hi if hi > lo else float(map_hw.max())
    lo = 0.0 if lo < 0 < hi else lo  # else pixels without saliency would be coloured
    return ((map_hw - lo) / (hi - lo if hi > lo else 1)).clip(0, 1).astype(np.float32)
