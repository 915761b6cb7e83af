"""From a batch and the task's results to the rows of the data file.

Shape suffixes: D decoded samples, R their rows (a sample has one for each of its targets), N samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.extract.task import STATUSES, Explained
from saltern.pipeline.runs.columns import Record, fill, fixed_lists, from_records, numbers
from saltern.schemas.run import Shard

_GEOMETRY = pa.list_(pa.float32(), 4)

# The columns that a job adds, from (the batch, the sample of each row among the decoded, the task's results).
Describe = Callable[[Batch, NDArray[np.intp], Explained], dict[str, pa.Array]]


@dataclass(frozen=True)
class Rows:
    """The form of a job's rows."""

    schema: pa.Schema
    describe: Describe
    reasons: Mapping[str, str]  # the column `error` by status

    def __call__(self, shard: Shard, batch: Batch, explained: Explained | None) -> pa.RecordBatch:
        """Return the rows of a batch, in the order of its samples.

        Args:
            shard: of the batch.
            batch: decoded.
            explained: results of the decoded samples, as many rows for each; None if there are none.
        """
        parts: list[pa.RecordBatch] = []
        at: list[NDArray[np.intp]] = []  # the sample of each row of the parts
        if explained is not None:
            parts.append(self._explained(shard, batch, explained))
            at.append(np.repeat(batch.decoded, len(explained.status_R) // len(batch.decoded)))
        if batch.problems:
            parts.append(from_records([_failed(shard, batch, position) for position in batch.problems], self.schema))
            at.append(np.array([*batch.problems]))
        for position, rows in batch.kept.items():
            parts.append(rows)
            at.append(np.full(rows.num_rows, position))
        if len(parts) == 1:
            return parts[0]
        return pa.concat_batches(parts).take(pa.array(np.argsort(np.concatenate(at), kind="stable")))

    def _explained(self, shard: Shard, batch: Batch, explained: Explained) -> pa.RecordBatch:
        rows, code_R = len(explained.status_R), pa.array(explained.status_R)
        slot_R = np.repeat(np.arange(len(batch.decoded)), rows // len(batch.decoded))
        sample_R = pa.array(np.array(batch.decoded)[slot_R])
        columns = {
            "key": pa.array(batch.keys, pa.string()).take(sample_R),
            "shard": pa.repeat(pa.scalar(shard.name, pa.string()), rows),
            "index": pa.array(batch.indices, pa.int32()).take(sample_R),
            "label": pa.array(batch.labels, pa.int32()).take(sample_R),
            "image_height": numbers(batch.size_D2[slot_R, 0], pa.int32()),
            "image_width": numbers(batch.size_D2[slot_R, 1], pa.int32()),
            "geometry": fixed_lists(batch.geometry_D4[slot_R].astype(np.float32), _GEOMETRY),
            "status": pa.array(STATUSES, pa.string()).take(code_R),
            "error": pa.array([self.reasons.get(status) for status in STATUSES], pa.string()).take(code_R),
        }
        return fill(columns | self.describe(batch, slot_R, explained), rows, self.schema)


def _failed(shard: Shard, batch: Batch, position: int) -> Record:
    status, reason = batch.problems[position]
    identity = {"key": batch.keys[position], "shard": shard.name, "index": batch.indices[position]}
    return {**identity, "label": batch.labels[position], "status": status, "error": reason}
