"""A rectangle that is drawn in an image comes back at its place, whatever size, crop, squash and EXIF say."""

import random
from typing import Any

import numpy as np
import pytest
from images import encoded
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from saltern.pipeline.maps.frame import lay, to_original, whole_image
from saltern.pipeline.metrics.localization.basins import bright_and_dark
from saltern.pipeline.metrics.localization.boxes import iou, map_f1, overlap, unit
from saltern.pipeline.metrics.localization.levels import parts_of
from saltern.pipeline.metrics.localization.maxbox import box_hits, eight_bits
from saltern.pipeline.metrics.localization.pixels import mask_at_input
from saltern.pipeline.metrics.localization.pointing import energy_inside, highest_point, is_pointed_at
from saltern.pipeline.shards.decode import Decoded, decode
from saltern.schemas.config import Preprocess
from saltern.schemas.saliency import Box

CROP = 64
UNDO = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that undoes each


def drawn(box: Box, height: int, width: int) -> NDArray[np.uint8]:
    image_YX = np.zeros((height, width), np.uint8)
    image_YX[box[1] : box[3], box[0] : box[2]] = 255
    return image_YX


def stored(upright_YX: NDArray[np.uint8], orientation: int) -> bytes:
    """Return a PNG whose EXIF turns it upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = UNDO.get(orientation, 1)
    image = Image.fromarray(upright_YX)
    image.info["exif"] = exif.tobytes()
    turned = ImageOps.exif_transpose(image)
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(turned, "PNG", exif=exif)


def visible(box: Box, decoded: Decoded) -> Box:
    """Return the part of the box that the crop shows."""
    scale_x, scale_y, offset_x, offset_y = decoded.geometry
    x1, y1 = offset_x + scale_x * CROP, offset_y + scale_y * CROP
    return max(box[0], round(offset_x)), max(box[1], round(offset_y)), min(box[2], round(x1)), min(box[3], round(y1))


def cases() -> list[Any]:
    draw, made = random.Random(0), list[Any]()
    for number in range(48):
        height, width = draw.randint(40, 240), draw.randint(40, 240)
        orientation = 1 + number % 8
        preprocess = Preprocess(resize=CROP + draw.choice([0, 8, 30]), crop=CROP, squash=number % 3 == 0)
        # A third of each side, in the middle half, so that some of it is in every crop.
        x0, y0 = draw.randint(width // 4, width // 2), draw.randint(height // 4, height // 2)
        box = x0, y0, x0 + draw.randint(width // 6, width // 3), y0 + draw.randint(height // 6, height // 3)
        made.append(pytest.param(height, width, orientation, preprocess, box, id=f"{number}"))
    return made


@pytest.mark.parametrize(("height", "width", "orientation", "preprocess", "box"), cases())
def test_the_rectangle_is_found(height: int, width: int, orientation: int, preprocess: Preprocess, box: Box) -> None:
    decoded = decode(stored(drawn(box, height, width), orientation), preprocess)
    assert (decoded.image_height, decoded.image_width) == (height, width)
    map_HW, shown = decoded.pixels_HWC[..., 0].astype(np.float32), visible(box, decoded)
    geometry_14, size_12 = np.array([decoded.geometry]), np.array([[height, width]], np.int32)
    geometry = list(decoded.geometry)

    parts = parts_of(bright_and_dark(eight_bits(map_HW[None]))[0])
    (half,) = np.flatnonzero(parts.level == 127)
    found = tuple(to_original(parts.box[[half]], geometry_14, size_12)[0].tolist())
    slack = max(geometry[:2])  # of one pixel of the input
    assert all(abs(edge - true) <= slack + 1 for edge, true in zip(found, shown, strict=True)), (found, shown)

    hits = np.unpackbits(box_hits(map_HW[None], (CROP, CROP), geometry_14, size_12, [[shown]]), axis=2, count=255)
    assert hits[0, :3, 127].all() or iou(found, [shown]) < 0.7
    point = highest_point(map_HW, (CROP, CROP), geometry, height, width)
    assert point is not None
    assert overlap((point[0], point[1], point[0] + 1, point[1] + 1), shown)
    assert is_pointed_at(point, [box], height, width)
    laid = lay(unit(map_HW), (CROP, CROP), geometry, height, width, smooth=True)
    assert energy_inside(laid, [whole_image(height, width)]) == pytest.approx(1)
    larger = round(2 * slack) + 1
    around = shown[0] - larger, shown[1] - larger, shown[2] + larger, shown[3] + larger
    assert energy_inside(laid, [around]) == pytest.approx(1, abs=1e-3)
    assert map_f1(laid, [shown]) > 0.75
    truth_HW = mask_at_input(drawn(box, height, width) // 255, (CROP, CROP), geometry)
    assert (truth_HW != (map_HW > 127)).sum() <= CROP // 2  # an edge may lie halfway between two centres
    assert (truth_HW == 1).any()


def test_a_true_box_outside_of_the_crop_is_missed() -> None:
    box = (0, 10, 18, 50)  # left of the crop of 60 pixels in 120
    decoded = decode(stored(drawn((50, 10, 70, 40), 60, 120), 1), Preprocess(resize=CROP, crop=CROP))
    map_HW, geometry = decoded.pixels_HWC[..., 0].astype(np.float32), list(decoded.geometry)
    assert geometry[2] > 18
    hits = box_hits(map_HW[None], (CROP, CROP), np.array([geometry]), np.array([[60, 120]], np.int32), [[box]])
    assert not hits.any()
    assert energy_inside(lay(unit(map_HW), (CROP, CROP), geometry, 60, 120, smooth=True), [box]) == 0
    assert not is_pointed_at(highest_point(map_HW, (CROP, CROP), geometry, 60, 120), [box], 60, 120)
