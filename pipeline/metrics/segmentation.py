"""The family `pixels`: maps and masks against the samples' pixel masks.

Shape suffixes: h w a map's grid, H W the network's input, Y X the upright original.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.control_rows import BOXES
from saltern.pipeline.metrics.estimate import ColumnMeans, Estimate
from saltern.pipeline.metrics.family import Batch, Family, Summary
from saltern.pipeline.metrics.judge import laid_mask, size_of
from saltern.pipeline.metrics.localization.pixels import BINS, PixelPrecision, mask_at_input, pixel_counts
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import FOREGROUND, IGNORED, MASK, read_mask
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.store import Store
from saltern.schemas.evaluation import BAD_MASK, NO_MASK
from saltern.schemas.metrics import METRICS


class _PixelSums:
    """The IoUs of the masks and the counts of the maps' pixels, by subject."""

    def __init__(self) -> None:
        self._ious = ColumnMeans(["segmentation_iou"])
        self._counts = defaultdict[str, PixelPrecision](PixelPrecision)

    @property
    def columns(self) -> Sequence[str]:
        return [*self._ious.columns, "pixel_counts"]

    def add(self, subject: str, rows: pa.RecordBatch) -> None:
        self._ious.add(subject, rows)
        counts = rows["pixel_counts"].drop_null()
        if len(counts):
            raw = np.frombuffer(b"".join(counts.to_pylist()), "<u4")
            self._counts[subject].add(raw.reshape(len(counts), 2, BINS))

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        found = self._ious.estimates()
        for subject, own in self._counts.items():
            value, low, high = own.average_precision()
            known = not np.isnan(value)  # it is not without any pixel of the foreground
            found[subject]["pxap"] = Estimate(value, low, high, own.samples if known else 0)
        return found


class Pixels(Family):
    """PxAP of the maps, and the IoU of the masks (weak segmentation), with the foreground of `mask.png`.

    A failed row has an IoU of 0. PxAP counts the pixels of the network's input: a row without a map counts as a
    constant one, and an image that the run could not read does not count.
    """

    name = "pixels"
    members = frozenset({MASK})
    metrics = METRICS["pixels"]

    @classmethod
    def check_census(cls, path: str, census: Census, unread: Mapping[str, str]) -> None:
        fix = f"a member {MASK}: 0 background, 1 or 255 foreground, 128 ignored, of the image's size"
        census.require(path, "a pixel mask to judge by", fix, unread)

    @classmethod
    def summary(cls, store: Store) -> Summary:
        return _PixelSums()

    def measure(self, batch: Batch) -> list[Record]:
        return [self._one(batch.subject, *pair) for pair in zip(batch.samples, batch.rows, strict=True)]

    def _one(self, subject: str, sample: Sample, row: Row) -> Record:
        size = size_of(row)
        if MASK not in sample.members:
            return {"status": NO_MASK, "error": f"it has no {MASK}"}
        if size is None:
            return {"segmentation_iou": 0.0}
        try:
            true_YX = read_mask(sample, *size)
        except ValueError as error:
            return {"status": BAD_MASK, "error": str(error)}
        assert true_YX is not None  # noqa: S101 - the sample has the member
        found_YX = _found(subject, row, *size)
        return {"segmentation_iou": segmentation_iou(found_YX, true_YX), "pixel_counts": self._counts(row, true_YX)}

    def _counts(self, row: Row, true_YX: NDArray[np.uint8]) -> bytes | None:
        if not self.config.save_map or row.geometry is None:
            return None
        map_hw = np.zeros((1, 1), np.float32) if row.map_bytes is None else row.map()
        true_HW = mask_at_input(true_YX, row.layout.input_shape, row.geometry)
        return pixel_counts(map_hw[None], true_HW[None]).astype("<u4").tobytes()


def _found(subject: str, row: Row, height: int, width: int) -> NDArray[np.bool_]:
    """Return the row's mask, or the box of a control that is one, over the original; False outside of the crop."""
    found_YX = np.zeros((height, width), bool)
    laid = laid_mask(row)
    if subject in BOXES:
        x0, y0, x1, y1 = BOXES[subject](height, width)
        found_YX[y0:y1, x0:x1] = True
    elif laid is not None:
        found_YX = laid.pixels() > 0
    return found_YX


def segmentation_iou(found_YX: NDArray[np.bool_], true_YX: NDArray[np.uint8]) -> float | None:
    """Return the IoU, in [0, 1], of a mask and the foreground, without the ignored pixels.

    Args:
        found_YX: the mask, over the original.
        true_YX: 0, FOREGROUND or IGNORED, as `read_mask` returns it.

    Returns:
        None if neither has a pixel.
    """
    found_YX, foreground_YX = found_YX & (true_YX != IGNORED), true_YX == FOREGROUND
    union = np.count_nonzero(found_YX | foreground_YX)
    return np.count_nonzero(found_YX & foreground_YX) / union if union else None
