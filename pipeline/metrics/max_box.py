"""The family `max-box`: MaxBoxAcc and MaxBoxAccV2, from the boxes of a map at every threshold.

Shape suffixes: M measured samples, h w the map's grid.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.family import Batch, Family, Summary
from saltern.pipeline.metrics.judge import check_boxes, read_truth, size_of
from saltern.pipeline.metrics.localization.accuracy import BoxAccuracies
from saltern.pipeline.metrics.localization.maxbox import IOUS, box_hits
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import Annotation
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import ExtractConfig
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import HIT_BYTES
from saltern.schemas.metrics import METRICS


class _BestHits:
    """The hits at each threshold, by subject."""

    columns = ("box_hits",)

    def __init__(self) -> None:
        self._sums = defaultdict[str, BoxAccuracies](BoxAccuracies)

    def add(self, subject: str, rows: pa.RecordBatch) -> None:
        hits = rows["box_hits"].drop_null()
        if len(hits):
            raw = np.frombuffer(b"".join(hits.to_pylist()), np.uint8)
            self._sums[subject].add(raw.reshape(len(hits), len(IOUS), -1))

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        found = {}
        for subject, own in self._sums.items():
            best = {"max_box_acc": own.max_box_acc(), "max_box_acc_v2": own.max_box_acc_v2()}
            found[subject] = {name: Estimate(it.value, it.low, it.high, own.samples) for name, it in best.items()}
        return found


class MaxBox(Family):
    """The share of samples with a box that hits a true one, at the best threshold of all samples: an oracle's choice.

    A row without a map is a miss. A constant map, as that of the whole image, has the box of its first pixel.
    """

    name = "max-box"
    metrics = METRICS["max-box"]

    @classmethod
    def check(cls, path: str, config: ExtractConfig) -> None:
        if not config.save_map:
            raise UserError(f"{path} stores no maps (--no-map), and {cls.name} needs them")

    @classmethod
    def check_census(cls, path: str, census: Census, unread: Mapping[str, str]) -> None:
        check_boxes(path, census, unread)

    @classmethod
    def summary(cls, store: Store) -> Summary:
        return _BestHits()

    def measure(self, batch: Batch) -> list[Record]:
        records, true = read_truth(batch)
        hits = hits_of_rows([batch.rows[at] for at in true], list(true.values()))
        for at, own in zip(true, hits, strict=True):
            records[at]["box_hits"] = own
        return records


def hits_of_rows(rows: Sequence[Row], true: Sequence[Annotation]) -> list[bytes]:
    """Return the packed hits of each row's map at each threshold; none for a row without a map."""
    found = [bytes(HIT_BYTES)] * len(rows)
    at_M = [at for at, row in enumerate(rows) if row.map_bytes is not None]
    if at_M:
        shown = [rows[at] for at in at_M]
        map_Mhw, geometry_M4 = np.stack([row.map() for row in shown]), np.array([row.geometry for row in shown])
        size_M2 = np.array([size_of(row) for row in shown], np.int32)
        boxes = [true[at].boxes for at in at_M]
        hits_M = box_hits(map_Mhw, shown[0].layout.input_shape, geometry_M4, size_M2, boxes)
        for at, hits in zip(at_M, hits_M, strict=True):
            found[at] = hits.tobytes()
    return found
