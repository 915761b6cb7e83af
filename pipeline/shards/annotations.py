"""True boxes as the samples' json member holds them."""

import json
from dataclasses import dataclass
from typing import Any

from saltern.pipeline.shards.samples import Sample
from saltern.schemas.saliency import Box


@dataclass(frozen=True)
class Annotation:
    """What a sample's json member says of its objects."""

    boxes: list[Box]  # half-open, pixels of the original
    size: tuple[int, int] | None  # height and width of the annotated image, where stated


def read_annotation(sample: Sample) -> Annotation | None:
    """The sample's boxes; None where it has none.

    The member's own are inclusive: its x1 and y1 are the last pixels inside. They are made half-open here, and nowhere
    else.

    Raises:
        ValueError: the member is no JSON object, or a box is not four whole numbers in order; one line says which.
    """
    try:
        found = json.loads(sample.members.get("json", b"{}"))
    except ValueError as error:
        raise ValueError(f"its json member is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("its json member is no object")
    boxes = found.get("boxes") or []
    if not isinstance(boxes, list):
        raise ValueError(f"its boxes are no list: {boxes!r}")
    if not boxes:
        return None
    height, width = found.get("height"), found.get("width")
    size = (height, width) if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0 else None
    return Annotation([_half_open(box) for box in boxes], size)


def _half_open(box: object) -> Box:
    """Raises ValueError."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box):
        x0, y0, x1, y1 = box
        if all(float(edge).is_integer() for edge in box) and x0 <= x1 and y0 <= y1:
            return int(x0), int(y0), int(x1) + 1, int(y1) + 1
    raise ValueError(f"{box!r} is no box: x0, y0, x1, y1 in whole pixels, x0 <= x1, y0 <= y1")


def extra(sample: Sample) -> dict[str, Any]:
    """The sample's json member; empty where there is none of our kind."""
    try:
        found = json.loads(sample.members.get("json", b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
