"""Estimate means over samples with their 95 % bootstrap intervals, in one pass over the data files.

Shape suffixes: B replicates of the bootstrap, N rows, C columns.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saltern.pipeline.runs.datafile import reading
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.storage.store import Store
from saltern.schemas.run import Shard

REPLICATES = 1000
LOW, HIGH = 2.5, 97.5  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95 % interval."""

    value: float  # NaN without values
    low: float
    high: float
    count: int  # samples that have a value

    @property
    def plus_minus(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def to_dict(self) -> dict[str, Any] | None:
        """Return the numbers as JSON; None without values."""
        if not self.count:
            return None
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


class Bootstrap:
    """Means of columns, and of 1,000 resamples of their rows, from sums that are kept while rows stream by.

    Each replicate draws every row a Poisson(1) number of times, which for many rows is drawing as many rows with
    replacement (Chamandy et al. 2012, Estimating uncertainty for massive data streams). The draws of a sample follow
    from its shard and position, so the replicates of two runs over the same shards are paired.
    """

    def __init__(self, columns: int):
        self._sum_C, self._count_C = np.zeros(columns), np.zeros(columns)
        self._sum_BC, self._count_BC = np.zeros((REPLICATES, columns)), np.zeros((REPLICATES, columns))

    def add(self, values_NC: NDArray[np.float64], weight_BN: NDArray[np.float32]) -> None:
        """Add rows; NaN is no value."""
        there_NC = ~np.isnan(values_NC)
        values_NC = np.where(there_NC, values_NC, 0)
        self._sum_C += values_NC.sum(0)
        self._count_C += there_NC.sum(0)
        self._sum_BC += weight_BN @ values_NC
        self._count_BC += weight_BN @ there_NC.astype(np.float64)

    def estimates(self) -> list[Estimate]:
        """Return the estimate of each column."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_C, mean_BC = self._sum_C / self._count_C, self._sum_BC / self._count_BC
        found = []
        for column, (mean, count) in enumerate(zip(mean_C.tolist(), self._count_C.astype(int).tolist(), strict=True)):
            drawn_B = mean_BC[:, column]
            drawn_B = drawn_B[~np.isnan(drawn_B)]  # a replicate that drew no row
            low, high = np.percentile(drawn_B, [LOW, HIGH]).tolist() if len(drawn_B) else (math.nan, math.nan)
            found.append(Estimate(mean, low, high, count))
        return found


# Cumulative Poisson(1) probabilities in units of 2^-16: a 16-bit random number becomes a count by a table.
_COUNTS = np.searchsorted(
    np.cumsum([2**16 * math.exp(-1) / math.factorial(n) for n in range(8)]), np.arange(2**16), "right"
).astype(np.uint8)


def draw_weights(shard: str, first: int, rows: int) -> NDArray[np.float32]:
    """Return how often each replicate draws each of the rows, weight_BN, by shard and number of the first row."""
    draw = np.random.default_rng([zlib.crc32(shard.encode()), first])
    weight_BN: NDArray[np.float32] = _COUNTS[draw.integers(0, 2**16, (REPLICATES, rows), np.uint16)].astype(np.float32)
    return weight_BN


def read_subjects(
    store: Store, shards: Sequence[Shard], columns: Sequence[str]
) -> Iterator[tuple[str, str, int, pa.RecordBatch]]:
    """Yield the rows of each subject as (shard, subject, position of the first row, rows), in pieces.

    Raises:
        ShardError: a data file is missing or damaged.
    """
    for shard in shards:
        place = store.full(data_name(shard.name))
        with reading(place), store.fs.open_input_file(place) as source:
            first: dict[str, int] = {}
            for batch in pq.ParquetFile(source).iter_batches(512, columns=["subject", *columns], use_threads=False):
                subject_N = np.asarray(batch["subject"].to_pylist())
                for subject in dict.fromkeys(subject_N.tolist()):
                    rows = batch.take(pa.array(np.flatnonzero(subject_N == subject)))
                    yield shard.name, subject, first.get(subject, 0), rows
                    first[subject] = first.get(subject, 0) + rows.num_rows


def estimate_means(store: Store, shards: Sequence[Shard], columns: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Return the mean of each column by subject, from the data files of the shards; nulls do not count."""
    sums: dict[str, Bootstrap] = {}
    for shard, subject, first, rows in read_subjects(store, shards, columns):
        values_NC = np.stack([_floats(rows[name]) for name in columns], 1)
        sums.setdefault(subject, Bootstrap(len(columns))).add(values_NC, draw_weights(shard, first, rows.num_rows))
    return {subject: dict(zip(columns, own.estimates(), strict=True)) for subject, own in sums.items()}


def _floats(column: pa.Array) -> NDArray[np.float64]:
    values_N: NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values_N
