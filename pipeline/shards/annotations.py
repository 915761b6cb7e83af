"""Read the annotated boxes in the samples' json members."""

import json
from dataclasses import dataclass
from typing import Any

from saltern.pipeline.shards.samples import Sample
from saltern.schemas.saliency import Box

_FAR = 2**31  # pixels; no image has such a side


@dataclass(frozen=True)
class Annotation:
    """The objects in a sample's json member."""

    boxes: list[Box]  # half-open, pixels of the original
    size: tuple[int, int] | None  # height and width of the annotated image, if given


def read_annotation(sample: Sample) -> Annotation | None:
    """Return the sample's annotation; None if it has no boxes.

    Boxes in the json member are inclusive: x1 and y1 are the last pixels inside. Only this function makes them
    half-open.

    Raises:
        ValueError: the member is not a JSON object, or a box is not four whole numbers in order. One line, names it.
    """
    try:
        content = json.loads(sample.members.get("json", b"{}"))
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
    return Annotation([_half_open(box) for box in boxes], size)


def _half_open(box: object) -> Box:
    """Return an inclusive box as a half-open one. Raise ValueError if it is not a box."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box):
        x0, y0, x1, y1 = box
        if all(abs(edge) < _FAR and float(edge).is_integer() for edge in box) and x0 <= x1 and y0 <= y1:
            return int(x0), int(y0), int(x1) + 1, int(y1) + 1
    raise ValueError(f"{repr(box)[:80]} is not a box: x0, y0, x1, y1 in whole pixels, x0 <= x1, y0 <= y1")


def extra(sample: Sample) -> dict[str, Any]:
    """Return the sample's json member; {} if it is missing or not a JSON object."""
    try:
        content = json.loads(sample.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
