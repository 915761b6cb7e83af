"""Conduct one run of a job: select the engine, resume, drive the shards, report."""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from saltern.pipeline.engine.driver import Driver, Outcome
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.pool import Factory, ShardProcessor
from saltern.pipeline.engine.progress import Progress, clock, shares
from saltern.pipeline.engine.selection import Engine, make_pool, select_engine
from saltern.pipeline.machine import cores, sigterm_as_interrupt
from saltern.pipeline.runs.begin import begin, check_folder
from saltern.pipeline.runs.manifest import failure_name, load_run, read_failures, read_receipt, read_receipts
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.runs.reasons import reasons_of, too_few_ok
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import Store, session
from saltern.schemas.errors import ShardError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard


@dataclass(frozen=True)
class RunOptions:
    """Options of a run's execution. They do not change its files."""

    out: str  # the run's folder or URL
    engine: str = "auto"  # auto | local | ray
    address: str | None = None  # of a Ray cluster
    workers: int | None = None
    gpus_per_worker: float | None = None
    decode_threads: int | None = None  # of each worker
    device: str = "auto"  # auto | cpu | cuda
    overwrite: bool = False
    retry_failed: bool = False
    shard_timeout_s: float | None = None
    max_failed_shards: int | None = None


@dataclass(frozen=True)
class Job:
    """The parts that differ between jobs.

    Args:
        plan: returns the requested run and hints for the user, from the existing run, the device and the
            number of workers.
        processor: builds the processor of a worker.
        close: runs after the last shard, if the run was not stopped early. Writes the run's pictures and summary from
            its data files.
    """

    plan: Callable[[Run | None, str, int], tuple[Run, list[str]]]
    processor: Callable[[Spec], ShardProcessor]
    close: Callable[[Store, Run], None] = lambda store, run: None


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    path: str  # the run's folder or URL
    code: int  # exit code of the command: 0 all done; 1 shards failed, too few rows ok, or stopped; 130 interrupted
    shards: int  # number of the run's shards
    done: int  # shards, including those of earlier calls
    rows: dict[str, int] = field(default_factory=dict)  # by status, of all shards that are done
    failures: dict[str, str] = field(default_factory=dict)  # kind and reason, by shard
    stuck: bool = False  # a thread may never end: leave the process with os._exit


def conduct(job: Job, options: RunOptions) -> RunResult:
    """Run the job, or resume it.

    Raises:
        UserError: the options are invalid or not possible on this machine; nothing was started.
    """
    root = options.out if "://" in options.out else os.path.abspath(options.out)
    store = Store(root)
    engine = select_engine(options.engine, options.device, options.address, options.workers, options.gpus_per_worker)
    existing = load_run(store)
    run, hints = job.plan(None if options.overwrite else existing, engine.device, engine.workers)
    check_folder(store, existing, run)
    for line in (*hints, str(engine)):
        print(line, file=sys.stderr)
    with session(store) as scratch, _sigterm():
        run = begin(store, run, overwrite=options.overwrite)
        threads = options.decode_threads or max(1, min(16, cores() // engine.workers))
        spec = Spec(run, root, str(scratch), engine.device, threads)
        result = _drive(store, spec, partial(job.processor, spec), options, engine)
        if result.code in (0, 1):
            job.close(store, run)
        return result


def _sigterm() -> contextlib.AbstractContextManager[None]:
    """Handle SIGTERM as Ctrl-C. Python allows signal handlers only in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    return sigterm_as_interrupt() if main else contextlib.nullcontext()


def _drive(store: Store, spec: Spec, factory: Factory, options: RunOptions, engine: Engine) -> RunResult:
    run = spec.run
    receipts = read_receipts(store, run)
    redo = {name for name, receipt in receipts.items() if options.retry_failed and receipt.failed}
    pending = [shard for shard in run.shards if shard.name not in receipts or shard.name in redo]
    done = len(run.shards) - len(pending)
    print(f"{done} of {len(run.shards)} shards done, {len(pending)} to do", file=sys.stderr)
    if not pending:
        print(f"nothing to do: all shards of {spec.root} are done")
        code = _judge(receipts.values())
        return RunResult(spec.root, code, len(run.shards), done, _rows(receipts.values()))
    pool = make_pool(engine, factory, spec.decode_threads, run.config.torch_threads)
    started = time.monotonic()
    with Progress(done, len(run.shards), _expected(pending, receipts)) as progress:
        driver = Driver(
            pool,
            Book(store, run, set(read_failures(store, receipts))),
            workers=min(engine.workers, len(pending)),
            timeout_s=options.shard_timeout_s,
            max_failed=options.max_failed_shards,
            redo=options.retry_failed,
            tick=progress,
        )
        try:
            outcome = driver.run(pending)
        except KeyboardInterrupt:
            outcome = driver.state.outcome
            outcome.stopped = "interrupted"
    done += len(outcome.receipts) + outcome.elsewhere
    _report(outcome, len(run.shards), done, spec.root, time.monotonic() - started)
    failures = {name: f"{failure.kind}: {failure.reason}" for name, failure in outcome.failures.items()}
    finished = {**receipts, **outcome.receipts}.values()
    code = _judge(finished) or int(bool(failures or outcome.stopped))
    code = 130 if outcome.stopped == "interrupted" else code
    stuck = isinstance(pool, LocalPool) and pool.abandoned
    return RunResult(spec.root, code, len(run.shards), done, _rows(finished), failures, stuck)


@dataclass
class Book:
    """The driver's view of the run's folder."""

    store: Store
    run: Run
    failing: set[str]  # shards with a recorded failure

    def receipt_of(self, shard: Shard) -> Receipt | None:
        return read_receipt(self.store, self.run, shard)

    def succeeded(self, receipt: Receipt) -> None:
        if receipt.shard in self.failing:
            self.store.remove([failure_name(receipt.shard)])

    def failed(self, failure: Failure) -> None:
        self.store.write(failure_name(failure.shard), failure.to_json())


def _expected(pending: Sequence[Shard], receipts: dict[str, Receipt]) -> int | None:
    """Estimate the images of the pending shards from their bytes and the samples per byte of shards that are done.

    If none is done, count the samples of the first pending shard, unless it is remote.
    """
    size = sum(receipt.size for receipt in receipts.values())
    samples = sum(receipt.samples for receipt in receipts.values())
    first = pending[0]
    if not size and "://" not in first.url:
        with contextlib.suppress(OSError, ShardError):
            size, samples = first.size, len(list_keys(first))
    return round(samples / size * sum(shard.size for shard in pending)) if size else None


def _report(outcome: Outcome, shards: int, done: int, root: str, seconds: float) -> None:
    rows = ", ".join(f"{count:,} {status}" for status, count in _rows(outcome.receipts.values()).items()) or "no rows"
    print(
        f"{done}/{shards} shards done in {root}: {outcome.samples:,} images in {clock(seconds)} "
        f"({outcome.samples / seconds:,.1f} images/s); rows: {rows}; time: {shares(outcome.seconds)}"
    )
    if outcome.stopped or outcome.failures:
        why = outcome.stopped or f"{len(outcome.failures)} shards failed"
        lost = f"; {outcome.lost:,} images of unfinished shards will be done again" if outcome.lost else ""
        print(f"{why}; finished shards are kept{lost}: repeat the command to resume", file=sys.stderr)


def _judge(receipts: Collection[Receipt]) -> int:
    """Print why rows are not ok. Return the exit code, 1 if too few are ok."""
    reasons, rows = reasons_of(receipts), _rows(receipts)
    for reason, count in reasons.items():
        print(f"{count:,} rows {reason}", file=sys.stderr)
    problem = too_few_ok(rows, reasons) if receipts else None
    if problem:
        print(f"FAILED: {problem}", file=sys.stderr)
    return int(problem is not None)


def _rows(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return the rows by status, the most frequent status first."""
    statuses: Counter[str] = sum((Counter(receipt.statuses) for receipt in receipts), Counter())
    return dict(statuses.most_common())
