"""One call of a job, from the request to the last line: choose the engine, resume, drive, report."""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from saltern.pipeline.engine.driver import Driver, Outcome
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.pool import Factory, ShardProcessor
from saltern.pipeline.engine.progress import Progress, clock, spent
from saltern.pipeline.engine.selection import Engine, make_pool, select_engine
from saltern.pipeline.machine import cores, sigterm_as_interrupt
from saltern.pipeline.runs.manifest import (
    begin,
    failure_name,
    load_run,
    publish_failure,
    read_failures,
    read_receipt,
    read_receipts,
    wipe,
)
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import Store, session
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard


@dataclass(frozen=True)
class RunOptions:
    """How a run is driven; nothing here changes what its files hold."""

    out: str
    engine: str = "auto"  # auto | local | ray
    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    decode_threads: int | None = None
    device: str = "auto"
    overwrite: bool = False
    retry_failed: bool = False
    shard_timeout_s: float | None = None
    max_failed_shards: int | None = None


@dataclass(frozen=True)
class Exit:
    """The command's exit code; `stuck` where threads are left that may never end."""

    code: int
    stuck: bool = False


@dataclass
class Book:
    """Results in the run's folder (the driver's view of it)."""

    store: Store
    run: Run
    scratch: Path
    failing: set[str]  # shards with a failure on record

    def standing(self, shard: Shard) -> Receipt | None:
        return read_receipt(self.store, self.run, shard)

    def succeeded(self, receipt: Receipt) -> None:
        if receipt.shard in self.failing:
            self.store.remove(failure_name(receipt.shard))

    def failed(self, failure: Failure) -> None:
        publish_failure(self.store, failure, self.scratch)


@dataclass(frozen=True)
class Job:
    """What differs between one job and another.

    Args:
        plan: the run that is asked for and hints in words, from the standing run, the device and the workers.
        processor: what a worker holds.
        close: called where every shard stands or has failed, with what has been done so far: makes what is for looking
            at, from the data files alone.
    """

    plan: Callable[[Run | None, str, int], tuple[Run, list[str]]]
    processor: Callable[[Spec], ShardProcessor]
    close: Callable[[Store, Run, Path], None] = lambda store, run, scratch: None


def conduct(job: Job, settings: RunOptions) -> Exit:
    """Do the job, or go on with it.

    Raises:
        UserError: the request cannot be met; nothing was started.
    """
    root = settings.out if "://" in settings.out else os.path.abspath(settings.out)
    store = Store(root)
    engine = select_engine(
        settings.engine, settings.device, settings.address, settings.workers, settings.gpus_per_worker
    )
    standing = None if settings.overwrite else load_run(store)
    run, hints = job.plan(standing, engine.device, engine.workers)
    for line in (*hints, str(engine)):
        print(line, file=sys.stderr)
    if settings.overwrite:
        _wipe(store, settings.out)
    with session(store) as scratch, sigterm_as_interrupt():
        run = begin(store, run, scratch)
        spec = Spec(run, root, str(scratch), engine.device, _threads(settings, engine))
        ended = _drive(store, spec, partial(job.processor, spec), settings, engine)
        if ended.code in (0, 1):
            job.close(store, run, scratch)
        return ended


def _threads(settings: RunOptions, engine: Engine) -> int:
    return settings.decode_threads or max(1, min(16, cores() // engine.workers))


def _wipe(store: Store, out: str) -> None:
    if store.read("run.json") is None and store.listing("", ""):
        raise UserError(f"--overwrite: {out} holds files but no run.json, so it is no run; choose another --out")
    wipe(store)


def _drive(store: Store, spec: Spec, factory: Factory, settings: RunOptions, engine: Engine) -> Exit:
    run = spec.run
    receipts = read_receipts(store, run)
    book = Book(store, run, Path(spec.scratch), set(read_failures(store, receipts)))
    redo = {name for name, receipt in receipts.items() if settings.retry_failed and receipt.failed}
    pending = [shard for shard in run.shards if shard.name not in receipts or shard.name in redo]
    standing = len(run.shards) - len(pending)
    print(f"{standing} of {len(run.shards)} shards stand, {len(pending)} to do", file=sys.stderr)
    if not pending:
        print(f"nothing to do: {spec.root} is whole")
        return Exit(0)
    pool = make_pool(engine, factory, spec.decode_threads, run.config.torch_threads)
    started = time.monotonic()
    with Progress(standing, len(run.shards), _expected(pending, receipts)) as progress:
        driver = Driver(
            pool,
            book,
            workers=min(engine.workers, len(pending)),
            timeout_s=settings.shard_timeout_s,
            max_failed=settings.max_failed_shards,
            redo=settings.retry_failed,
            tick=progress,
        )
        try:
            outcome = driver.run(pending)
        except KeyboardInterrupt:
            outcome = driver.state.outcome
            outcome.stopped = "interrupted"
    _report(outcome, len(run.shards), standing, spec.root, time.monotonic() - started)
    stuck = isinstance(pool, LocalPool) and pool.abandoned
    if outcome.stopped == "interrupted":
        return Exit(130, stuck)
    return Exit(1 if outcome.failures or outcome.stopped else 0, stuck)


def _expected(pending: Sequence[Shard], receipts: dict[str, Receipt]) -> int | None:
    """Images of the shards to do, from the samples a byte of those that stand, else of the first if it is at hand."""
    size = sum(receipt.size for receipt in receipts.values())
    samples = sum(receipt.samples for receipt in receipts.values())
    first = pending[0]
    if not size and "://" not in first.url:
        with contextlib.suppress(OSError, ShardError):
            size, samples = first.size, len(list_keys(first))
    return round(samples / size * sum(shard.size for shard in pending)) if size else None


def _report(outcome: Outcome, shards: int, standing: int, root: str, seconds: float) -> None:
    receipts = outcome.receipts.values()
    statuses: Counter[str] = sum((Counter(receipt.statuses) for receipt in receipts), Counter())
    samples = sum(receipt.samples for receipt in receipts)
    done = standing + len(receipts) + outcome.elsewhere
    rows = ", ".join(f"{count:,} {status}" for status, count in statuses.most_common()) or "no rows"
    print(
        f"{done}/{shards} shards stand in {root}: {samples:,} images in {clock(seconds)} "
        f"({samples / seconds:,.1f} images/s); rows: {rows}; time: {spent(receipts)}"
    )
    for failure in outcome.failures.values():
        print(f"{failure.shard}: {failure.kind}: {failure.reason}", file=sys.stderr)
    if outcome.stopped or outcome.failures:
        why = outcome.stopped or f"{len(outcome.failures)} shards failed"
        print(f"{why}; what stands is kept: the same command again goes on from here", file=sys.stderr)
