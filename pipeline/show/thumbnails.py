"""Draw small pictures of a row: the photograph, the map over it, what the mask shows, hides and has inpainted.

They share the photograph, and the browser lays small maps and masks over it.

Shape suffixes: Y X a thumbnail of the whole upright original, h w a stored map's grid.
"""

import io
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.maps.inpaint import inpaint
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.decode import DecodeError, decode_image
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.show.page import CROP, FOUND, GIVEN, WHOLE, DrawnBox, Layer, Picture, Place

SIDE = 256  # longer side of a thumbnail, pixels; a smaller original keeps its own
_QUALITY = 75  # of WebP
_MAP_SIDE = 96  # longer side of a map's colours, pixels
_HEAT = 0.6  # opacity of a map
_TOP = 0.995  # quantile of a map that gets the brightest colour, so that one high pixel does not darken the map
Pixels = NDArray[np.uint8]
Bits = NDArray[np.bool_]


def pictures(row: Row, sample: Sample | None, facts: Mapping[str, str]) -> list[Picture]:
    """Return the pictures of a row that can be drawn: photograph, map, masked-in, masked-out, inpainted."""
    photo_YX3 = photograph(row, sample)
    if photo_YX3 is None:
        return []
    given, photo = given_boxes(sample, row), _layer(photo_YX3)
    geometry = geometry_in(row, photo_YX3)
    if geometry is None:
        return [_picture([photo], photo_YX3, f"{row.key}: {row.status}", given)]
    crop, found = _crop(row, geometry, photo_YX3), found_boxes(row)
    class_ = facts["target"] or facts["label"]
    shown = [_picture([photo], photo_YX3, f"{row.key}, {class_}", [*given, *found], "photograph")]
    if row.map_bytes is not None:
        layers = [photo, _heat(row, geometry, photo_YX3)]
        shown.append(_picture(layers, photo_YX3, f"map of {row.key} for {class_}", crop, "map"))
    if row.mask_bytes is not None:
        what = f"mask of {row.key}: {facts['mask']} of the input, box {facts['box'] or 'none'}"
        boxes = [*crop, *given, *found]
        mask_YX, seen_YX = _mask(row, geometry, photo_YX3)
        hidden = {"masked-in": [_black(seen_YX & ~mask_YX)], "masked-out": [_black(mask_YX)]}
        if sample is not None:
            hidden["inpainted"] = [_filling(photo_YX3, mask_YX, seen_YX)]
        for name, layers in hidden.items():
            own = boxes if name == "masked-in" else crop
            words = what if name == "masked-in" else f"{row.key} with its mask {name.removeprefix('masked-')}"
            shown.append(_picture([photo, *layers], photo_YX3, words, own, name))
    return shown


def overlay(row: Row, photo: Layer, photo_YX3: Pixels, caption: str) -> Picture | None:
    """Return the row's map, or else its mask, over the photograph, with its box; None if it has neither."""
    geometry = geometry_in(row, photo_YX3)
    if geometry is None or (row.map_bytes is None and row.mask_bytes is None):
        return None
    boxes = [*_crop(row, geometry, photo_YX3), *found_boxes(row)]
    if row.map_bytes is not None:
        over = _heat(row, geometry, photo_YX3)
    else:
        mask_YX, seen_YX = _mask(row, geometry, photo_YX3)
        over = _black(seen_YX & ~mask_YX)
    return _picture([photo, over], photo_YX3, f"{caption} of {row.key}", boxes, caption)


def photograph(row: Row, sample: Sample | None) -> Pixels | None:
    """Return the whole upright original, its longer side at most SIDE.

    Without it, return a grey field if its size is known, else None.
    """
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
    return _picture([_layer(pixels_YX3)], pixels_YX3, words, boxes, caption)


def geometry_in(row: Row, photo_YX3: Pixels) -> list[float] | None:
    """Return the geometry of the input in the thumbnail: scale x, scale y, offset x, offset y."""
    if row.geometry is None or row.image_width is None or row.image_height is None:
        return None
    scales = (photo_YX3.shape[1] / row.image_width, photo_YX3.shape[0] / row.image_height) * 2
    return [part * scale for part, scale in zip(row.geometry, scales, strict=True)]


def _size(width: int, height: int) -> tuple[int, int]:
    scale = min(1, SIDE / max(width, height))
    return max(1, round(scale * width)), max(1, round(scale * height))


def _box(kind: str, box: Sequence[float], row: Row) -> DrawnBox:
    width, height = row.image_width or 1, row.image_height or 1
    return DrawnBox(kind, box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def _crop(row: Row, geometry: list[float], photo_YX3: Pixels) -> list[DrawnBox]:
    """Return the part of the original that the network saw; [] if it saw all."""
    (height, width), (x0, y0, x1, y1) = photo_YX3.shape[:2], _seen(row, geometry, photo_YX3)
    whole = x0 * width < 1 and y0 * height < 1 and x1 * width > width - 1 and y1 * height > height - 1
    return [] if whole else [DrawnBox(CROP, x0, y0, x1, y1)]


def _seen(row: Row, geometry: list[float], photo_YX3: Pixels) -> Place:
    """Return the place of the network's input in the photograph."""
    (height, width), input_shape = photo_YX3.shape[:2], row.layout.input_shape
    scale_x, scale_y, x0, y0 = geometry
    return x0 / width, y0 / height, (x0 + scale_x * input_shape[1]) / width, (y0 + scale_y * input_shape[0]) / height


def _picture(
    layers: Sequence[Layer], photo_YX3: Pixels, words: str, boxes: Iterable[DrawnBox], caption: str = ""
) -> Picture:
    height, width = photo_YX3.shape[:2]
    return Picture(tuple(layers), width, height, words, tuple(boxes), caption)


def _layer(pixels_YXC: Pixels, place: Place = WHOLE, opacity: float = 1, *, lossless: bool = False) -> Layer:
    """Return RGB or RGBA pixels as a layer."""
    stream = io.BytesIO()
    Image.fromarray(pixels_YXC).save(stream, "WEBP", quality=_QUALITY, lossless=lossless)
    return Layer(stream.getvalue(), place, opacity)


def _heat(row: Row, geometry: list[float], photo_YX3: Pixels) -> Layer:
    """Return the map's colours as a small layer over the part that the network saw."""
    map_hw, (height, width) = _unit(row.map()), row.layout.input_shape
    scale = _MAP_SIDE / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    smaller = map_hw.shape[0] > size[1] or map_hw.shape[1] > size[0]
    fine_hw = cv2.resize(map_hw, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((fine_hw * 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return _layer(np.ascontiguousarray(colours), _seen(row, geometry, photo_YX3), _HEAT)


def _mask(row: Row, geometry: list[float], photo_YX3: Pixels) -> tuple[Bits, Bits]:
    """Return the mask in the photograph, and what the network saw of it."""
    share_YX = over_frame(row.mask().astype(np.float32), row.layout.input_shape, geometry, *photo_YX3.shape[:2])
    return share_YX >= 0.5, np.isfinite(share_YX)


def _black(hidden_YX: Bits) -> Layer:
    """Return a layer that is black where the image is hidden, and else transparent."""
    pixels_YX4 = np.zeros((*hidden_YX.shape, 4), np.uint8)
    pixels_YX4[..., 3] = 255 * hidden_YX
    return _layer(pixels_YX4, lossless=True)


def _filling(photo_YX3: Pixels, mask_YX: Bits, seen_YX: Bits) -> Layer:
    """Return a layer with the mask inpainted from the rest of what the network saw, and else transparent."""
    filled_YX4 = np.zeros((*mask_YX.shape, 4), np.uint8)
    if seen_YX.any():
        part = np.s_[seen_YX.any(1)], np.s_[seen_YX.any(0)]
        crop = np.ix_(*part)
        filled_YX4[..., :3][crop] = inpaint(np.ascontiguousarray(photo_YX3[crop]), mask_YX[crop])
    filled_YX4[..., 3] = 255 * mask_YX
    return _layer(filled_YX4)


def _unit(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a map to [0, 1], from its minimum (of a signed map from 0) to its _TOP quantile."""
    lo, hi = float(map_hw.min()), float(np.quantile(map_hw, _TOP))
    hi = hi if hi > lo else float(map_hw.max())
    lo = 0.0 if lo < 0 < hi else lo  # else pixels without saliency would be coloured
    return ((map_hw - lo) / (hi - lo if hi > lo else 1)).clip(0, 1).astype(np.float32)
