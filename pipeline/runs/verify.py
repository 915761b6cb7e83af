"""Verify a run: every wanted shard has an intact data file of this run, with rows for every sample of its tar."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from saltern.pipeline.runs.agreement import label_doubt
from saltern.pipeline.runs.datafile import open_data, reading
from saltern.pipeline.runs.manifest import data_name, failure_name, judge_receipts, receipt_name
from saltern.pipeline.runs.reasons import reasons_of
from saltern.pipeline.shards.samples import content_of, list_keys
from saltern.pipeline.storage.store import SCRATCH, Store
from saltern.schemas.config import EVALUATE, EXPORT, VISUALIZE
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import CLASSES, Run, Shard, same_time
from saltern.schemas.text import counted

GONE = "the tar is gone (if it was moved, --shards says where it is)"
MISSING = "its data file is missing"
AGAIN = "repeat the command, which makes it again"
STRANGER = "move it away, or delete it if nothing needs it"
REMOTE = "the tar is in an object store, where reading its keys costs as much as reading all of it"


@dataclass(frozen=True)
class Finding:
    """One problem of a run."""

    shard: str  # or the file's name, if it belongs to no shard
    reason: str
    fix: str


@dataclass
class Verdict:
    """The result of `verify`. The run is complete and intact if `findings` is empty."""

    shards: int
    done: int
    samples: int = 0
    rows: int = 0
    recounted: int = 0  # shards whose tar was read again; the counts of the others come from their receipts
    findings: list[Finding] = field(default_factory=list)
    # Why tars were not read again, with the number of shards and the first tar.
    unproven: dict[str, tuple[int, str]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)  # the most frequent ones of rows that are not ok
    warning: str | None = None  # about the labels


def verify(store: Store, run: Run) -> Verdict:
    """Check every shard, and that the folder holds only files of the run.

    Raises:
        UserError: a receipt or a folder of the run cannot be read at all, or it holds results that derive from a run.
    """
    if run.config.job in (EVALUATE, EXPORT):
        raise UserError(
            f"{store.path} holds results that derive from a run; the command that made them checks them when it is "
            "repeated, and the run itself can be verified"
        )
    receipts, invalid = judge_receipts(store, run)
    verdict = Verdict(len(run.shards), len(receipts))
    failures, damaged = _failures(store, run)
    for shard in run.shards:
        receipt = receipts.get(shard.name)
        if receipt is None:
            failure = failures.get(shard.name)
            reason = invalid.get(shard.name) or (f"failed: {failure.reason}" if failure else "not done")
            verdict.findings.append(Finding(shard.name, reason, AGAIN))
            continue
        verdict.samples += receipt.samples
        verdict.rows += receipt.rows
        keys = None
        try:
            if changed := _change(run, shard, receipt):
                verdict.findings.append(Finding(shard.name, changed, AGAIN))
            else:
                keys = _keys(run, shard)
                verdict.recounted += 1
        except ShardError as error:
            verdict.findings.append(Finding(shard.name, str(error), "copy the tar again from its source"))
        except OSError as error:
            count, first = verdict.unproven.get(str(error), (0, shard.url))
            verdict.unproven[str(error)] = (count + 1, first)
        remake = f"delete {store.full(data_name(shard.name))} and {AGAIN}"
        for reason in _check(store, run, shard, receipt, keys):
            verdict.findings.append(Finding(shard.name, reason, AGAIN if reason == MISSING else remake))
    verdict.findings += [*damaged, *_unknown_files(store, run)]
    verdict.reasons = reasons_of(receipts.values())
    verdict.warning = label_doubt(store, run, receipts)
    return verdict


def _change(run: Run, shard: Shard, receipt: Receipt) -> str | None:
    """Return how the tar differs from the one that was read; None if it does not.

    Raises:
        OSError: the tar cannot be read, or reading it is expensive; its message is the reason.
        ShardError: the tar is damaged.
    """
    if run.config.job == VISUALIZE:
        return None
    if "://" in shard.url:
        raise OSError(REMOTE)
    with _local(shard):
        info = os.stat(shard.url)
        if info.st_size != receipt.size:
            return f"its tar has {info.st_size} bytes, and had {receipt.size} when it was read"
        known = same_time(info.st_mtime_ns, receipt.mtime_ns) or not receipt.content
        if not known and content_of(shard) != receipt.content:
            return "its tar was written again with other content since it was read"
    return None


def _keys(run: Run, shard: Shard) -> list[str]:
    """Return the keys of the tar, or the classes. Raises OSError and ShardError as `_change`."""
    if run.config.job == VISUALIZE:
        return shard.url.removeprefix(CLASSES).split(",")
    with _local(shard):
        return list_keys(shard)


@contextlib.contextmanager
def _local(shard: Shard) -> Iterator[None]:
    """Raise OSError with the reason for the user if a tar cannot be read."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise OSError(GONE) from None
    except OSError as error:
        raise OSError(f"the tar cannot be read ({error.strerror or error})") from error


def _table(store: Store, run: Run, shard: Shard, receipt: Receipt) -> dict[str, list[Any]]:
    """Return the columns of a data file that name its rows. Raises ShardError if it is not the one of the receipt."""
    place = "its data file"
    try:
        raw = store.read(data_name(shard.name))
    except (OSError, UserError) as error:
        raise ShardError(f"{place} cannot be read: {error}") from error
    if raw is None:
        raise ShardError(MISSING)
    if len(raw) != receipt.data_bytes or hashlib.sha256(raw).hexdigest() != receipt.digest:
        raise ShardError(f"{place} is not the one that its receipt was written for (digest differs)")
    file = open_data(run, place, pa.BufferReader(raw))
    with reading(place):
        columns: dict[str, list[Any]] = file.read(["key", "index", "target", "shard", "status"]).to_pydict()
    return columns


def _check(store: Store, run: Run, shard: Shard, receipt: Receipt, keys: list[str] | None) -> Iterator[str]:
    """Yield what is wrong with a data file; `keys` are those of its tar, if they are known."""
    try:
        table = _table(store, run, shard, receipt)
    except ShardError as error:
        yield str(error)
        return
    if len(table["key"]) != receipt.rows:
        yield f"{counted(len(table['key']), 'row')}, the receipt says {receipt.rows}"
    if (statuses := Counter(table["status"])) != Counter(receipt.statuses):
        yield f"its rows have the statuses {dict(statuses)}, the receipt says {receipt.statuses}"
    if set(table["shard"]) - {shard.name}:
        yield "it has rows of another shard"
    if len(set(zip(table["index"], table["target"], strict=True))) != len(table["key"]):
        yield "it has a sample's target twice"
    samples = list(dict.fromkeys(zip(table["index"], table["key"], strict=True)))
    if len(samples) != receipt.samples or any(index != number for number, (index, _) in enumerate(samples)):
        yield f"its rows are not those of the samples 0..{receipt.samples - 1}, each once, in order"
    if keys is not None and [key for _, key in samples] != keys:
        yield f"its keys are not those of the tar ({len(samples)} samples in the data file, {len(keys)} in {shard.url})"


def _failures(store: Store, run: Run) -> tuple[dict[str, Failure], list[Finding]]:
    """Return the failures by shard name, and findings about damaged ones."""
    failures, findings = {}, []
    for name, raw in store.read_all("failures"):
        try:
            failure = Failure.from_json(raw, sealed=run.sealed)
            if failure_name(failure.shard) != f"failures/{name}":
                raise ValueError(f"it is of the shard {failure.shard}")
            failures[failure.shard] = failure
        except ValueError as error:
            findings.append(Finding(f"failures/{name}", f"is damaged ({error})", "delete it"))
    return failures, findings


def _unknown_files(store: Store, run: Run) -> Iterator[Finding]:
    names = {name(shard.name) for shard in run.shards for name in (data_name, receipt_name, failure_name)}
    for folder in ("data", "receipts", "failures"):
        for name in store.listing(folder, ""):
            if f"{folder}/{name}" not in names:
                yield Finding(f"{folder}/{name}", "belongs to no shard of this run", STRANGER)
    if store.local:
        for name in sorted(os.listdir(store.path)):
            if name.startswith(SCRATCH):
                reason = "is a temporary file: a run is in progress, or one was killed"
                yield Finding(name, reason, "the next run removes it")
