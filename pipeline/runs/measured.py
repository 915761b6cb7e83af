"""Read what metrics found for the samples of a run, from RUN/metrics.

Shape suffixes: R rows of the run, N samples.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saltern.pipeline.runs.datafile import reading
from saltern.pipeline.runs.manifest import data_name, load_run, read_receipt
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.storage.ahead import read_ahead
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EvaluateConfig
from saltern.schemas.errors import ShardError
from saltern.schemas.evaluation import evaluation_schema
from saltern.schemas.metrics import METRICS, Metric
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run

Place = tuple[str, int]  # of a sample: its shard's name, and its index there


@dataclass(frozen=True)
class Measured:
    """What one family of metrics found for a run."""

    family: str
    store: Store  # of its folder
    run: Run  # in its folder
    digests: dict[str, str]  # of the data files of the measured run, by shard
    metrics: dict[str, Metric]  # those with a value for each sample
    summary: dict[str, dict[str, float]]  # value, low, high and count by metric; empty if it is of another run

    def current(self, shards: Iterable[str]) -> list[str]:
        """Return those of the shards that it has measured as they are now. Reads only their receipts."""
        names = list(shards)
        return [name for name, held in zip(names, read_ahead(self._holds, names), strict=True) if held]

    def _holds(self, shard: str) -> bool:
        with contextlib.suppress(ShardError):
            return shard in self.digests and is_of(read_receipt(self.store, self.run, shard), self.digests[shard])
        return False

    def read(self, shard: str, *names: str) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
        """Return the samples' indices in a shard, and the values of each metric; NaN = none.

        Raises:
            ShardError: the data file is missing or damaged.
        """
        place = self.store.full(data_name(shard))
        with reading(place), self.store.fs.open_input_file(place) as source:
            table = pq.ParquetFile(source).read(["index", *names], use_threads=False)
        index_N = table["index"].to_numpy().astype(np.int64)
        # Files of older versions lack the newer metrics.
        there = table.column_names
        return index_N, {
            name: _floats(table[name]) if name in there else np.full(len(index_N), np.nan) for name in names
        }


def read_measured(run: SaliencyRun) -> list[Measured]:
    """Return what each family found. Measurements of data files that the run has replaced are left out."""
    digests = {shard.name: receipt.digest for shard, receipt in zip(run.shards, run.receipts, strict=True)}
    found = (_open(run, family, digests) for family in METRICS)
    first, others = list(digests)[:1], list(digests)[1:]  # mostly the first receipt tells
    return [one for one in found if one is not None and (one.current(first) or one.current(others))]


def is_of(receipt: Receipt, digest: str) -> bool:
    """Return whether an evaluation's receipt is of the run's data file of this digest.

    Its content is the start of the digest and the CRC-32 of the tar's samples, 8 hex digits each.
    """
    return receipt.content is not None and receipt.content[:-8] == f"{int(digest[:8], 16):x}"


def column(run: SaliencyRun, found: Measured, name: str) -> NDArray[np.float64]:
    """Return a metric for each row of the run; NaN = none. Only the first row of a sample was measured."""
    index_R = run.columns("index")["index"].to_numpy()
    values_R = np.full(len(index_R), np.nan)
    stops = np.cumsum([receipt.rows for receipt in run.receipts]).tolist()
    rows_of = {
        shard.name: slice(stop - receipt.rows, stop)
        for shard, receipt, stop in zip(run.shards, run.receipts, stops, strict=True)
    }
    shards = found.current(rows_of)
    read = read_ahead(lambda shard: found.read(shard, name), shards)
    for shard, (index_N, values) in zip(shards, read, strict=True):
        rows = rows_of[shard]
        own, first = np.unique(index_R[rows], return_index=True)
        there = np.isin(index_N, own)
        values_R[rows][first[np.searchsorted(own, index_N[there])]] = values[name][there]
    return values_R


def sample_values(found: Iterable[Measured], places: Iterable[Place]) -> dict[Place, dict[str, float]]:
    """Return the metrics of samples; a metric without a value is left out."""
    wanted: dict[str, set[int]] = {}
    for shard, index in places:
        wanted.setdefault(shard, set()).add(index)
    made: dict[Place, dict[str, float]] = {}
    files = [(one, shard) for one in found for shard in one.current(sorted(wanted))]
    read = read_ahead(lambda file: file[0].read(file[1], *file[0].metrics), files)
    for (_, shard), (index_N, values) in zip(files, read, strict=True):
        for at in np.flatnonzero(np.isin(index_N, list(wanted[shard]))).tolist():
            own = {name: float(value_N[at]) for name, value_N in values.items() if not np.isnan(value_N[at])}
            made.setdefault((shard, int(index_N[at])), {}).update(own)
    return made


def _open(run: SaliencyRun, family: str, digests: dict[str, str]) -> Measured | None:
    store = Store(f"{run.path.rstrip('/')}/metrics/{family}")
    own = load_run(store)
    if own is None or not isinstance(own.config, EvaluateConfig) or own.config.source != run.run.fingerprint:
        return None
    there = evaluation_schema(family)
    metrics = {name: metric for name, metric in METRICS[family].items() if name in there.names}
    return Measured(family, store, own, digests, metrics, _summary(run, family))


def _summary(run: SaliencyRun, family: str) -> dict[str, dict[str, float]]:
    try:
        stored: Any = json.loads(run.store.read(f"metrics/{family}.json") or b"{}")
        if stored.get("fingerprint") != run.run.fingerprint:
            return {}
        ends = ("value", "low", "high", "count")
        found = {name: own for name, own in stored["metrics"].items() if own and name in METRICS[family]}
        return {name: {end: float(own[end]) for end in ends} for name, own in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}  # it can be made again; the values of the samples are elsewhere


def _floats(values: pa.ChunkedArray) -> NDArray[np.float64]:
    """Return numbers; of a list of booleans, as of several classifiers, the share of the true ones."""
    if pa.types.is_list(values.type):
        return np.array([np.mean(own) if own else np.nan for own in values.to_pylist()], np.float64)
    floats_N: NDArray[np.float64] = values.cast(pa.float64()).to_numpy()
    return floats_N
