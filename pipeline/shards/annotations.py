"""Read the annotated boxes in the samples' json members, and their pixel masks."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.shards.decode import DecodeError, decode_image
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.saliency import Box

MASK = "mask.png"
FOREGROUND, IGNORED = 1, 255  # of a mask as `read_mask` returns it
_FAR = 2**31  # pixels; no image has such a side
_MEANING = np.zeros(256, np.uint8)  # of a value in the file
_MEANING[[1, 255]], _MEANING[128] = FOREGROUND, IGNORED


@dataclass(frozen=True)
class Annotation:
    """The objects in a sample's json member."""

    boxes: list[Box]  # half-open, pixels of the original
    size: tuple[int, int] | None  # height and width of the annotated image, if given
    distractors: int | None = None  # number of other categories that the image shows, if given


def read_annotation(sample: Sample) -> Annotation | None:
    """Return the sample's annotation; None if it has no boxes.

    `distractors` in the json member is a list of the other categories that the image shows, or their number.
    Boxes in the json member are inclusive: x1 and y1 are the last pixels inside. Only this function makes them
    half-open.

    Raises:
        ValueError: the member is not a JSON object, a box is not four whole numbers in order, or the distractors are
            neither a list nor a number. One line, names it.
    """
    try:
        content = json.loads(bytes(sample.members.get("json", b"{}")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json member is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("its json member is not an object")
    boxes = content.get("boxes") or []
    if not isinstance(boxes, list):
        raise ValueError(f"its boxes are not a list: {boxes!r:.80}")
    if not boxes:
        return None
    height, width = content.get("height"), content.get("width")
    size = None
    if isinstance(height, int) and isinstance(width, int) and 0 < min(height, width) <= max(height, width) < _FAR:
        size = height, width
    return Annotation([_half_open(box) for box in boxes], size, _number(content.get("distractors")))


def _number(distractors: object) -> int | None:
    """Return the number of distractors; None if it is not given."""
    if isinstance(distractors, list):
        return len(distractors)
    if distractors is None or (isinstance(distractors, int) and not isinstance(distractors, bool) and distractors >= 0):
        return distractors
    raise ValueError(f"its distractors are neither a list of categories nor their number: {distractors!r:.80}")


def _half_open(box: object) -> Box:
    """Return an inclusive box as a half-open one. Raise ValueError if it is not a box."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box):
        x0, y0, x1, y1 = box
        if all(abs(edge) < _FAR and float(edge).is_integer() for edge in box) and x0 <= x1 and y0 <= y1:
            return int(x0), int(y0), int(x1) + 1, int(y1) + 1
    raise ValueError(f"{repr(box)[:80]} is not a box: x0, y0, x1, y1 in whole pixels, x0 <= x1, y0 <= y1")


def read_mask(sample: Sample, height: int, width: int) -> NDArray[np.uint8] | None:
    """Return the sample's pixel mask, member `mask.png`: 0, FOREGROUND or IGNORED; None if it has none.

    The file is a grey image of the original's size: 0 is background, 1 or 255 foreground, 128 ignored. Samples have
    the member only if they were read with `read_samples(..., more={MASK})`.

    Args:
        sample: the sample.
        height, width: of the upright original, pixels.

    Raises:
        ValueError: it is no such image. One line.
    """
    data = sample.members.get(MASK)
    if data is None:
        return None
    try:
        pixels_YXC = np.asarray(decode_image(bytes(data)))
    except DecodeError as error:
        raise ValueError(f"its {MASK} cannot be decoded: {error}") from error
    if pixels_YXC.shape[:2] != (height, width):
        found = "{} x {}".format(*pixels_YXC.shape[:2])
        raise ValueError(f"its {MASK} has {found} pixels, the image {height} x {width} (height x width)")
    values = np.unique(pixels_YXC).tolist()
    if not {0, 1, 128, 255}.issuperset(values) or (pixels_YXC != pixels_YXC[..., :1]).any():
        raise ValueError(f"its {MASK} is not grey with 0, 1 or 255 for foreground, 128 for ignored: {values[:8]}")
    mask_YX: NDArray[np.uint8] = _MEANING[pixels_YXC[..., 0]]
    return mask_YX


def extra(sample: Sample) -> dict[str, Any]:
    """Return the sample's json member; {} if it is missing or not a JSON object."""
    try:
        content = json.loads(bytes(sample.members.get("json", b"{}")))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
