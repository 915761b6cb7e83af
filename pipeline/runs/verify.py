"""Proof of a run: every wanted shard has its data file, whole, of this run, with a row for every sample of its tar."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.runs.manifest import data_name, read_failures, read_receipts
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import SCRATCH, Store
from saltern.schemas.errors import ShardError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import CLASSES, VISUALIZE, Run, Shard
from saltern.schemas.saliency import read_metadata


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold."""

    shard: str  # or the file's name, where it belongs to no shard
    reason: str


@dataclass
class Verdict:
    """What `verify` found. The run holds where `findings` is empty."""

    shards: int
    done: int
    samples: int
    rows: int
    recounted: int  # shards whose tar was read again; the others' counts are their receipts'
    findings: list[Finding]


def verify(store: Store, run: Run) -> Verdict:
    """Check every shard, and that nothing lies in the folder that is not the run's."""
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
    verdict.findings += _strangers(store, run)
    return verdict


def _keys(run: Run, shard: Shard) -> list[str] | None:
    """The keys of the tar, or the classes, where they can be had at little cost; None where not."""
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
        yield "its data file is gone"
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
        yield "it holds rows of another shard"
    if table.select(["index", "target"]).group_by(["index", "target"]).aggregate([]).num_rows != table.num_rows:
        yield "it holds a sample's target twice"
    found = dict.fromkeys(zip(table["index"].to_pylist(), table["key"].to_pylist(), strict=True))
    if [index for index, _ in found] != list(range(receipt.samples)):
        yield f"its rows do not stand for the samples 0..{receipt.samples - 1}, each once, in order"
    if keys is not None and [key for _, key in found] != keys:
        yield f"its keys are not those of the tar ({len(found)} samples in the data file, {len(keys)} in {shard.url})"


def _strangers(store: Store, run: Run) -> Iterator[Finding]:
    """Files that no wanted shard accounts for."""
    wanted = {data_name(shard.name).removeprefix("data/") for shard in run.shards}
    for name in store.listing("data", ""):
        if name not in wanted:
            yield Finding(f"data/{name}", "belongs to no shard of this run")
    if store.local:
        for name in store.listing("", ""):
            if name.startswith(SCRATCH):
                yield Finding(name, "is a temporary file: a run is going on, or one was killed; the next run sweeps it")
