"""Judge the samples of a shard by their true boxes."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from saltern.pipeline.maps.frame import lay, whole_image
from saltern.pipeline.metrics.localization.boxes import box_f1, centre_box, is_hit, map_f1, unit
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import Annotation, read_annotation
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.saliency import OK, ZERO_MAP, Box

COLUMNS = ("le", "om", "f1", "f1_mask")
FOUND, CENTRE, WHOLE = SUBJECTS = ("found", "centre", "whole")  # the run, and the two baselines
SCALED, AS_IS, NO_MAPS = MAPS = ("scaled", "as-is", "none")  # scaled to [0, 1]; already in [0, 1]; not stored

# One row for each sample with boxes.
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # of the run's row
        # le and om are 0 or 1, f1 in [0, 1]; om is null without a label, found_f1 without stored maps
        *(pa.field(f"{subject}_{column}", pa.float32()) for subject in SUBJECTS for column in COLUMNS),
    ]
)


@dataclass
class Judged:
    """The judged samples of one shard."""

    maps: str = SCALED  # how F1 treats the maps, one of MAPS
    rows: list[dict[str, Any]] = field(default_factory=list)  # of SCHEMA
    without_boxes: int = 0
    bad: dict[str, str] = field(default_factory=dict)  # shard and key -> why its annotation cannot be read
    failed: dict[str, str] = field(default_factory=dict)  # shard and key -> status and reason of the run's row
    other_size: int = 0  # samples annotated at another size than the image has
    several: bool = False  # True: a sample has several targets

    def add(self, sample: Sample, rows: list[Row]) -> None:
        """Judge a sample by the first of its rows."""
        row, place = rows[0], f"{rows[0].shard}: {sample.key}"
        self.several = self.several or len(rows) > 1
        try:
            truth = read_annotation(sample)
        except ValueError as error:
            self.bad[place] = str(error)
            return
        if truth is None:
            self.without_boxes += 1
            return
        if row.status not in (OK, ZERO_MAP):
            self.failed[place] = f"{row.status}: {row.error}"
        size = _size(row)
        self.other_size += None not in (size, truth.size) and size != truth.size
        self.rows.append(_judge(row, truth, self.maps))


def _size(row: Row) -> tuple[int, int] | None:
    """Return height and width of the image; None if it could not be read."""
    return None if row.image_height is None or row.image_width is None else (row.image_height, row.image_width)


def _judge(row: Row, truth: Annotation, maps: str) -> dict[str, Any]:
    """Return one row of SCHEMA."""
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in row.boxes or ()]
    scores = {FOUND: _scores(row, truth, boxes, _map_f1(row, truth, maps), _mask_f1(row, truth))}
    for subject, baseline in ((CENTRE, centre_box), (WHOLE, whole_image)):
        size = _size(row) or truth.size
        box = baseline(*size) if size else None  # without a size, the baselines miss too
        f1 = box_f1(box, truth.boxes) if box else 0.0
        scores[subject] = _scores(row, truth, [box] if box else [], f1, f1)
    named = {f"{subject}_{name}": value for subject, of in scores.items() for name, value in of.items()}
    return {"key": row.key, "shard": row.shard, "index": row.index, "status": row.status, **named}


def _scores(row: Row, truth: Annotation, boxes: list[Box], f1: float | None, f1_mask: float) -> dict[str, float | None]:
    hit = is_hit(boxes, truth.boxes)
    # Without a label it is not known whether the top-1 is right.
    om = None if row.label is None else float(not (hit and row.predicted == row.label))
    return {"le": float(not hit), "om": om, "f1": f1, "f1_mask": f1_mask}


def _map_f1(row: Row, truth: Annotation, maps: str) -> float | None:
    """Return the F1 of the row's map; None if the run stores no maps."""
    if maps == NO_MAPS:
        return None
    size = _size(row)
    if row.map_bytes is None or row.geometry is None or size is None:
        return 0.0
    map_hw = row.map().clip(0, 1) if maps == AS_IS else unit(row.map())
    return map_f1(lay(map_hw, row.layout.input_shape, row.geometry, *size, smooth=True), truth.boxes)


def _mask_f1(row: Row, truth: Annotation) -> float:
    """Return the F1 of the row's mask."""
    size = _size(row)
    if row.mask_bytes is None or row.geometry is None or size is None:
        return 0.0
    mask_HW = row.mask().astype(float)
    return map_f1(lay(mask_HW, row.layout.input_shape, row.geometry, *size, smooth=False), truth.boxes)
