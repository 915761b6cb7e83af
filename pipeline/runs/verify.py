"""Verify a run: every wanted shard has an intact data file of this run, with rows for every sample of its tar."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.runs.agreement import label_doubt
from saltern.pipeline.runs.manifest import data_name, read_failures, read_receipts
from saltern.pipeline.runs.reasons import reasons_of
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import SCRATCH, Store
from saltern.schemas.config import VISUALIZE
from saltern.schemas.errors import ShardError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import CLASSES, Run, Shard
from saltern.schemas.saliency import read_metadata


@dataclass(frozen=True)
class Finding:
    """One problem of a run."""

    shard: str  # or the file's name, if it belongs to no shard
    reason: str


@dataclass
class Verdict:
    """The result of `verify`. The run is complete and intact if `findings` is empty."""

    shards: int
    done: int
    samples: int
    rows: int
    recounted: int  # shards whose tar was read again; the counts of the others come from their receipts
    findings: list[Finding]
    reasons: dict[str, int] = field(default_factory=dict)  # the most frequent ones of rows that are not ok
    warning: str | None = None  # about the labels


def verify(store: Store, run: Run) -> Verdict:
    """Check every shard, and that the folder holds only files of the run."""
    receipts = read_receipts(store, run)
    verdict = Verdict(len(run.shards), len(receipts), 0, 0, 0, [])
    failures = read_failures(store, receipts)
    for shard in run.shards:
        receipt = receipts.get(shard.name)
        if receipt is None:
            failure = failures.get(shard.name)
            reason = f"failed: {failure.reason}" if failure else "not done"
            verdict.findings.append(Finding(shard.name, reason))
            continue
        verdict.samples += receipt.samples
        verdict.rows += receipt.rows
        keys = _keys(run, shard)
        verdict.recounted += keys is not None
        verdict.findings += [Finding(shard.name, reason) for reason in _check(store, run, shard, receipt, keys)]
    verdict.findings += _unknown_files(store, run)
    verdict.reasons = reasons_of(receipts.values())
    verdict.warning = label_doubt(store, run, receipts)
    return verdict


def _keys(run: Run, shard: Shard) -> list[str] | None:
    """Return the keys of the tar, or the classes; None if reading them is expensive or impossible."""
    if run.config.job == VISUALIZE:
        return shard.url.removeprefix(CLASSES).split(",")
    if "://" in shard.url:
        return None
    try:
        return list_keys(shard)
    except (OSError, ShardError):
        return None


def _check(store: Store, run: Run, shard: Shard, receipt: Receipt, keys: list[str] | None) -> Iterator[str]:
    raw = store.read(data_name(shard.name))
    if raw is None:
        yield "its data file is missing"
        return
    if hashlib.sha256(raw).hexdigest() != receipt.digest:
        yield "its data file is not the one that its receipt was written for (digest differs)"
        return
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        table = file.read(columns=["key", "index", "target", "shard"])
    except (pa.ArrowInvalid, OSError) as error:
        yield f"its data file cannot be read: {error}"
        return
    if read_metadata(file.schema_arrow).get("fingerprint") != run.fingerprint:
        yield "its data file has another fingerprint"
    if table.num_rows != receipt.rows:
        yield f"{table.num_rows} rows, the receipt says {receipt.rows}"
    if set(table["shard"].unique().to_pylist()) - {shard.name}:
        yield "it has rows of another shard"
    if table.select(["index", "target"]).group_by(["index", "target"]).aggregate([]).num_rows != table.num_rows:
        yield "it has a sample's target twice"
    samples = dict.fromkeys(zip(table["index"].to_pylist(), table["key"].to_pylist(), strict=True))
    if [index for index, _ in samples] != list(range(receipt.samples)):
        yield f"its rows are not those of the samples 0..{receipt.samples - 1}, each once, in order"
    if keys is not None and [key for _, key in samples] != keys:
        yield f"its keys are not those of the tar ({len(samples)} samples in the data file, {len(keys)} in {shard.url})"


def _unknown_files(store: Store, run: Run) -> Iterator[Finding]:
    wanted = {data_name(shard.name).removeprefix("data/") for shard in run.shards}
    for name in store.listing("data", ""):
        if name not in wanted:
            yield Finding(f"data/{name}", "belongs to no shard of this run")
    if store.local:
        for name in store.listing("", ""):
            if name.startswith(SCRATCH):
                reason = "is a temporary file: a run is in progress, or one was killed; the next run removes the file"
                yield Finding(name, reason)
