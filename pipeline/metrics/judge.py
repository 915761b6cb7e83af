"""The family `localization`: boxes, maps and masks against the true boxes of the samples."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from saltern.pipeline.maps.frame import Laid, lay
from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.control_rows import BOXES
from saltern.pipeline.metrics.family import Batch, Family
from saltern.pipeline.metrics.localization.boxes import (
    area,
    box_f1,
    clipped,
    covered,
    disjoint,
    is_hit,
    map_f1,
    mask_iou,
    overlap,
    unit,
)
from saltern.pipeline.metrics.localization.pointing import (
    energy_inside,
    highest_point,
    is_difficult,
    is_pointed_at,
)
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import Annotation, read_annotation
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.evaluation import BAD_BOXES, FOUND, NO_BOXES
from saltern.schemas.metrics import METRICS
from saltern.schemas.saliency import Box

UNIT_MAPS = ("casm", "localizer")  # methods whose map is already a mask in [0, 1]
SCALED, AS_IS, NO_MAPS = MAPS = ("scaled", "as-is", "none")  # scaled to [0, 1]; already in [0, 1]; not stored


def maps_of(config: ExtractConfig) -> str:
    """Return how F1 treats the maps of a run: one of MAPS."""
    return NO_MAPS if not config.save_map else AS_IS if config.method in UNIT_MAPS else SCALED


class Localization(Family):
    """LE, OM and the continuous F1 of a row's box, map and mask.

    - LE: no box of the row has an IoU of more than 0.5 with a true one. OM: the same, or the top-1 is wrong.
    - F1 (continuous) of the map m in [0, 1], the best over the true boxes. A real-valued map is scaled from its
      smallest stored value to its largest, then laid over the original (bilinear, 0 outside of the crop). Maps of
      UNIT_MAPS are not scaled. F1 of the mask is the same with m = mask.

    A failed row counts as a miss. On the first 2,000 validation images of Tiny ImageNet, 160 pixels,
    EfficientNet-Lite0, CAM of the top-1, mean:1: LE 39.0, F1 51.6; of the label, LE 38.5, F1 51.6. (Boxes read as
    half-open would give LE 40.2 and F1 51.1.)
    """

    name = "localization"
    metrics = METRICS["localization"]

    def __init__(self, config: ExtractConfig, how: EvaluateConfig, device: torch.device):
        super().__init__(config, how, device)
        self._maps = maps_of(config)

    @classmethod
    def check_census(cls, path: str, census: Census, unread: Mapping[str, str]) -> None:
        check_boxes(path, census, unread)

    def measure(self, batch: Batch) -> list[Record]:
        records, true = read_truth(batch)
        for at, truth in true.items():
            records[at] = self._one(batch.subject, batch.rows[at], truth)
        return records

    def _one(self, subject: str, row: Row, truth: Annotation) -> Record:
        size = size_of(row)
        other = {"other_size": None not in (size, truth.size) and size != truth.size}
        maps = self._maps if subject == FOUND else SCALED
        found = {**scores(row, truth, maps), "box_iou": _box_iou(row, truth)}
        if subject in BOXES:
            size = size or truth.size
            box = BOXES[subject](*size) if size else None
            found = {**box_scores(row, truth, box), "box_iou": 0.0}
            if box and size:
                found["box_iou"] = covered(box, [clipped(one, *size) for one in truth.boxes])
        found = other | found | _pointing(row, truth, maps)
        if subject in BOXES and box:
            found["energy"] = sum(overlap(box, one) for one in disjoint(truth.boxes)) / area(box)
        return found


def read_truth(batch: Batch) -> tuple[list[Record], dict[int, Annotation]]:
    """Return the records of a batch, which say why a sample cannot be judged, and the true boxes of the others."""
    records: list[Record] = []
    true: dict[int, Annotation] = {}
    for at, sample in enumerate(batch.samples):
        record: Record = {}
        try:
            truth = truth_of(sample, batch.rows[at])
            if truth is None:
                record = {"status": NO_BOXES, "error": "its json has no boxes"}
            else:
                true[at] = truth
        except ValueError as error:
            record = {"status": BAD_BOXES, "error": str(error)}
        records.append(record)
    return records, true


def truth_of(sample: Sample, row: Row) -> Annotation | None:
    """Return the true boxes of a sample, None if it has none; `row` is that of the sample.

    Raises:
        ValueError: as `read_annotation`; or a box has no pixel of the image, in the size it was annotated at. One line.
    """
    truth = read_annotation(sample)
    size = None if truth is None else truth.size or size_of(row)
    if truth is None or size is None:
        return truth
    for box in truth.boxes:
        if not area(clipped(box, *size)):
            x0, y0, x1, y1 = box
            raise ValueError(
                f"its box {[x0, y0, x1 - 1, y1 - 1]} lies outside of the image, {size[1]} x {size[0]} pixels"
            )
    return truth


def check_boxes(path: str, census: Census, unread: Mapping[str, str]) -> None:
    """Raise UserError if all shards were read and no sample has boxes."""
    fix = "`saltern pack --boxes` packs ILSVRC annotations as `boxes` of the json member"
    census.require(path, "boxes to judge by", fix, unread)


def size_of(row: Row) -> tuple[int, int] | None:
    """Return height and width of the image; None if it could not be read."""
    return None if row.image_height is None or row.image_width is None else (row.image_height, row.image_width)


def scores(row: Row, truth: Annotation, maps: str) -> dict[str, float | None]:
    """Judge a row by the true boxes.

    Args:
        maps: how F1 treats the map, one of MAPS.

    Returns:
        le, om, f1, f1_mask; om is None without a label, f1 if the run stores no maps.
    """
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in row.boxes or ()]
    return {**_hit(row, truth, boxes), "f1": _map_f1(row, truth, maps), "f1_mask": _mask_f1(row, truth)}


def box_scores(row: Row, truth: Annotation, box: Box | None) -> dict[str, float | None]:
    """Judge a box as `scores` does, with the map that is 1 inside; None, without a size, is a miss."""
    f1 = 0.0 if box is None else box_f1(box, truth.boxes)
    return {**_hit(row, truth, [] if box is None else [box]), "f1": f1, "f1_mask": f1}


def _hit(row: Row, truth: Annotation, boxes: list[Box]) -> dict[str, float | None]:
    hit = is_hit(boxes, truth.boxes)
    # Without a label it is not known whether the top-1 is right.
    return {"le": float(not hit), "om": None if row.label is None else float(not (hit and row.predicted == row.label))}


def _pointing(row: Row, truth: Annotation, maps: str) -> dict[str, float | None]:
    """Judge where the map's maximum and its energy lie; a row without a map points nowhere."""
    if maps == NO_MAPS:
        return {}
    size, hit, energy, difficult = size_of(row), False, 0.0, None
    if row.map_bytes is not None and row.geometry is not None and size is not None:
        map_hw, shape = row.map(), row.layout.input_shape
        hit = is_pointed_at(highest_point(map_hw, shape, row.geometry, *size), truth.boxes, *size)
        energy = energy_inside(lay(_scaled(map_hw, maps), shape, row.geometry, *size, smooth=True), truth.boxes)
    if size is not None:
        difficult = is_difficult(truth.boxes, truth.distractors, *size)
    return {"pointing": float(hit), "pointing_difficult": float(hit) if difficult else None, "energy": energy}


def _scaled(map_hw: NDArray[np.float32], maps: str) -> NDArray[np.float32]:
    """Return the map in [0, 1]."""
    return map_hw.clip(0, 1) if maps == AS_IS else unit(map_hw)


def _map_f1(row: Row, truth: Annotation, maps: str) -> float | None:
    """Return the F1 of the row's map; None if the run stores no maps."""
    if maps == NO_MAPS:
        return None
    size = size_of(row)
    if row.map_bytes is None or row.geometry is None or size is None:
        return 0.0
    return map_f1(lay(_scaled(row.map(), maps), row.layout.input_shape, row.geometry, *size, smooth=True), truth.boxes)


def _mask_f1(row: Row, truth: Annotation) -> float:
    """Return the F1 of the row's mask."""
    laid = laid_mask(row)
    return 0.0 if laid is None else map_f1(laid, truth.boxes)


def _box_iou(row: Row, truth: Annotation) -> float:
    """Return the IoU of the row's mask and the true boxes, filled."""
    laid = laid_mask(row)
    return 0.0 if laid is None else mask_iou(laid, truth.boxes)


def laid_mask(row: Row) -> Laid | None:
    """Lay the row's mask over the original, each pixel with its cell's value; None if the row has no mask."""
    size = size_of(row)
    if row.mask_bytes is None or row.geometry is None or size is None:
        return None
    return lay(row.mask().astype(float), row.layout.input_shape, row.geometry, *size, smooth=False)
