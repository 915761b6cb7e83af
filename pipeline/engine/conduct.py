"""Conduct one run of a job: select the engine, resume, drive the shards, report."""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from saltern.pipeline.engine.driver import DEVICE, Driver
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.outcome import Outcome
from saltern.pipeline.engine.pool import Factory, ShardProcessor
from saltern.pipeline.engine.progress import Progress, clock, shares
from saltern.pipeline.engine.selection import Engine, make_pool, select_engine
from saltern.pipeline.machine import decode_threads, sigterm_as_interrupt
from saltern.pipeline.runs.begin import Begun, begin, check_folder, read_begun
from saltern.pipeline.runs.manifest import failure_name, load_run, receipt_name
from saltern.pipeline.runs.outlet import Made, Spec, accepted
from saltern.pipeline.runs.reasons import reasons_of, too_few_ok
from saltern.pipeline.runs.recover import recover
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.lock import Lock
from saltern.pipeline.storage.session import Session, session
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import DamagedRunError, ShardError, UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Run, Shard
from saltern.schemas.text import counted

AGAIN = 75  # exit code, EX_TEMPFAIL: the same command, in a new process, goes on


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

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise UserError("--out is empty: is a variable of the shell unset?")
        if self.overwrite and self.retry_failed:
            raise UserError("--retry-failed has no effect with --overwrite; leave one of them out")


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
    code: int  # of the command: 0 done; 1 failed shards, too few rows ok, stopped; 75 lost device; 130 interrupted
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
    existing, damage = None, None
    with _explained(options.out):
        try:
            existing = load_run(store)
        except DamagedRunError as error:
            damage = error
    run, hints = job.plan(None if options.overwrite else existing, engine.device, engine.workers)
    for line in (*hints, str(engine)):
        print(line, file=sys.stderr)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm())
        with _explained(options.out):
            held, run, begun = _start(stack, store, run, existing, damage, options.overwrite)
        spec = Spec(run, root, held.scratch, engine.device, options.decode_threads or 0, options.retry_failed)
        try:
            result = _drive(
                spec,
                begun,
                Book(store, held.lock, begun),
                partial(_build, job.processor, spec.without_shards()),
                options,
                engine,
            )
        except Exception:
            if existing is None and not store.sizes("data"):
                store.remove(["run.json"])  # nothing was done, and it would refuse the corrected command
            raise
        if result.code in (0, 1):
            with _explained(options.out):
                job.close(store, run)
        return result


def _build(processor: Callable[[Spec], ShardProcessor], spec: Spec) -> ShardProcessor:
    """Build a worker's processor, on the worker's machine."""
    return processor(replace(spec, decode_threads=spec.decode_threads or decode_threads()))


def _start(
    stack: contextlib.ExitStack,
    store: Store,
    run: Run,
    existing: Run | None,
    damage: UserError | None,
    overwrite: bool,
) -> tuple[Session, Run, Begun]:
    """Own the run's folder, and begin the run in it. If its run.json is missing or damaged, write it again."""
    recovered, why = (None, "") if existing else recover(store, run, damage)
    check_folder(store, existing or recovered, run, why)
    held = stack.enter_context(session(store))
    if recovered is not None:
        store.write("run.json", recovered.to_json())
        print("run.json was missing or damaged, and is written again: all files are of this command", file=sys.stderr)
    run = begin(store, run, overwrite=overwrite)
    return held, run, read_begun(store, run)


@contextlib.contextmanager
def _explained(out: str) -> Iterator[None]:
    """Raise UserError for an error of the run's folder or its store."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from error


def _sigterm() -> contextlib.AbstractContextManager[None]:
    """Handle SIGTERM as Ctrl-C. Python allows signal handlers only in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    return sigterm_as_interrupt() if main else contextlib.nullcontext()


def _drive(spec: Spec, begun: Begun, book: "Book", factory: Factory, options: RunOptions, engine: Engine) -> RunResult:
    run, receipts = spec.run, begun.receipts
    earlier = {
        name: receipt
        for name, receipt in receipts.items()
        if name in begun.doubtful or (options.retry_failed and receipt.failed)
    }
    pending = [shard for shard in run.shards if shard.name not in receipts or shard.name in earlier]
    done = len(run.shards) - len(pending)
    for line in begun.notes():
        print(line, file=sys.stderr)
    print(f"{done} of {len(run.shards)} shards done, {len(pending)} to do", file=sys.stderr)
    if not pending:
        print(f"nothing to do: all shards of {spec.root} are done")
        code = _judge(receipts.values())
        return RunResult(spec.root, code, len(run.shards), done, _rows(receipts.values()))
    pool = make_pool(engine, factory, options.decode_threads, run.config.torch_threads)
    started = time.monotonic()
    with Progress(done, len(run.shards), _expected(pending, receipts)) as progress:
        driver = Driver(
            pool,
            book,
            workers=min(engine.workers, len(pending)),
            timeout_s=options.shard_timeout_s,
            max_failed=options.max_failed_shards,
            earlier=earlier,
            kills={name: it.attempts for name, it in begun.failures.items() if it.kind == DEVICE},
            tick=progress,
        )
        try:
            outcome = driver.run(pending)
        except KeyboardInterrupt:
            outcome = driver.state.outcome
            outcome.stopped = "interrupted"
    done += len(outcome.receipts)
    _report(outcome, len(run.shards), done, spec.root, time.monotonic() - started)
    _say_halved(outcome.receipts.values(), run.config.batch_size)
    failures = {name: f"{failure.kind}: {failure.reason}" for name, failure in outcome.failures.items()}
    finished = {**receipts, **outcome.receipts}.values()
    code = _judge(finished) or int(bool(failures or outcome.stopped))
    code = 130 if outcome.stopped == "interrupted" else AGAIN if outcome.device_lost else code
    # A process without its device may not end by itself either.
    stuck = isinstance(pool, LocalPool) and (pool.abandoned or outcome.device_lost)
    return RunResult(spec.root, code, len(run.shards), done, _rows(finished), failures, stuck)


class Book:
    """The driver's access to the run's folder. Nothing else publishes."""

    def __init__(self, store: Store, lock: Lock, begun: Begun):
        self.store, self._lock = store, lock
        self._recorded = {*begun.receipts, *begun.invalid}
        self._failing = set(begun.failures)

    def publish(self, made: Made) -> Receipt:
        """Publish a shard's files, then its receipt. An old receipt goes first, so that none is ever of other data."""
        receipt = made.receipt
        with accepted(self.store):
            self._lock.check()
            if made.files and receipt.shard in self._recorded:
                self.store.remove([receipt_name(receipt.shard)])
            for name, source in made.files.items():
                self.store.move(source, name)
            self.store.write(receipt_name(receipt.shard), receipt.to_json())
            if receipt.shard in self._failing:
                self.store.remove([failure_name(receipt.shard)])
        return receipt

    def failed(self, failure: Failure) -> None:
        with accepted(self.store):
            self._lock.check()
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
        f"{done}/{shards} shards done in {root}: {counted(outcome.samples, 'image')} in {clock(seconds)} "
        f"({outcome.samples / seconds:,.1f} images/s); rows: {rows}; time: {shares(outcome.seconds)}"
    )
    if outcome.stopped or outcome.failures:
        why = outcome.stopped or f"{counted(len(outcome.failures), 'shard')} failed"
        lost = f"; {counted(outcome.lost, 'image')} of unfinished shards will be done again" if outcome.lost else ""
        print(f"{why}; finished shards are kept{lost}: repeat the command to resume", file=sys.stderr)


def _say_halved(receipts: Collection[Receipt], batch_size: int) -> None:
    """Say that memory ran out, if it did."""
    smaller = [receipt.batch_size for receipt in receipts if 0 < receipt.batch_size < batch_size]
    if smaller:
        print(
            f"memory ran out: {len(smaller)} of {len(receipts)} shards were computed in batches of {min(smaller)}, not "
            f"of {batch_size}",
            file=sys.stderr,
        )


def _judge(receipts: Collection[Receipt]) -> int:
    """Print why rows are not ok. Return the exit code, 1 if too few are ok."""
    reasons, rows = reasons_of(receipts), _rows(receipts)
    for reason, count in reasons.items():
        print(f"{counted(count, 'row')} {reason}", file=sys.stderr)
    problem = too_few_ok(rows, reasons) if receipts else None
    if problem:
        print(f"FAILED: {problem}", file=sys.stderr)
    return int(problem is not None)


def _rows(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return the rows by status, the most frequent status first."""
    statuses: Counter[str] = sum((Counter(receipt.statuses) for receipt in receipts), Counter())
    return dict(statuses.most_common())
