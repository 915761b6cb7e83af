"""Conduct one run of a job: select the engine, resume, drive the shards, report."""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from saltern.pipeline.engine.book import Books
from saltern.pipeline.engine.driver import DEVICE, Driver
from saltern.pipeline.engine.folders import Folder, read_folders, start
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.outcome import Outcome
from saltern.pipeline.engine.pool import Factory, ShardProcessor
from saltern.pipeline.engine.progress import Progress, clock, shares
from saltern.pipeline.engine.selection import Engine, make_pool, select_engine
from saltern.pipeline.machine import decode_threads, sigterm_as_interrupt
from saltern.pipeline.runs.begin import no_objection
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.runs.reasons import reasons_of, too_few_ok
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import ShardError, UserError, printable
from saltern.schemas.receipt import Receipt
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
        objection: returns why the shard of a valid receipt must be done again, or None.
    """

    plan: Callable[[Run | None, str, int], tuple[Run, list[str]]]
    processor: Callable[[Spec], ShardProcessor]
    close: Callable[[Store, Run], None] = lambda store, run: None
    objection: Callable[[Receipt], str | None] = no_objection


@dataclass(frozen=True)
class Jobs:
    """Several runs that one processor makes from the same shards, each in its folder below --out.

    Args:
        names: of the runs and of their folders.
        plan: as of Job, for the runs of these names.
        processor: builds the processor of a worker.
        close: as of Job, for each run.
    """

    names: Sequence[str]
    plan: Callable[[Mapping[str, Run | None], str, int], tuple[dict[str, Run], list[str]]]
    processor: Callable[[Mapping[str, Spec]], ShardProcessor]
    close: Callable[[Store, Run], None] = lambda store, run: None


@dataclass(frozen=True)
class RunResult:
    """The result of a run, or of several."""

    path: str  # the run's folder or URL
    code: int  # of the command: 0 done; 1 failed shards, too few rows ok, stopped; 75 lost device; 130 interrupted
    shards: int  # number of the run's shards
    done: int  # shards, including those of earlier calls; of several runs, those that all have
    rows: dict[str, int] = field(default_factory=dict)  # by status, of all shards that are done
    failures: dict[str, str] = field(default_factory=dict)  # kind and reason, by shard
    finished: dict[str, str] = field(default_factory=dict)  # digests of data files by shard; of one run
    stuck: bool = False  # a thread may never end: leave the process with os._exit
    runs: dict[str, "RunResult"] = field(default_factory=dict)  # of each of several runs, by name


def conduct(job: Job | Jobs, options: RunOptions) -> RunResult:
    """Run the job, or resume it.

    Raises:
        UserError: the options are invalid or not possible on this machine; nothing was started.
    """
    root = options.out if "://" in options.out else os.path.abspath(options.out)
    engine = select_engine(options.engine, options.device, options.address, options.workers, options.gpus_per_worker)
    with _explained(options.out):
        folders = read_folders(root, [""] if isinstance(job, Job) else job.names)
    hints = _plan(job, folders, options, engine)
    for line in (*hints, str(engine)):
        print(printable(line), file=sys.stderr)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm())
        with _explained(options.out):
            objection = job.objection if isinstance(job, Job) else no_objection
            start(stack, root, folders, options.overwrite, objection)
        specs = {it.name: _spec(it, options, engine) for it in folders}
        build = partial(_build, job.processor, specs[""] if isinstance(job, Job) else specs)
        try:
            result = _drive(root, folders, build, options, engine)
        except Exception:
            for it in folders:
                if it.existing is None and not it.store.sizes("data"):
                    it.store.remove(["run.json"])  # nothing was done, and it would refuse the corrected command
            raise
        if result.code in (0, 1):
            with _explained(options.out):
                for it in folders:
                    job.close(it.store, it.run)
        return result


def _plan(job: Job | Jobs, folders: Sequence[Folder], options: RunOptions, engine: Engine) -> list[str]:
    """Plan the runs of the folders. Return hints for the user."""
    existing = {it.name: None if options.overwrite else it.existing for it in folders}
    if isinstance(job, Job):
        folders[0].run, hints = job.plan(existing[""], engine.device, engine.workers)
        return hints
    runs, hints = job.plan(existing, engine.device, engine.workers)
    for it in folders:
        it.run = runs[it.name]
    return hints


def _spec(folder: Folder, options: RunOptions, engine: Engine) -> Spec:
    threads = options.decode_threads or 0
    spec = Spec(folder.run, folder.root, folder.held.scratch, engine.device, threads, options.retry_failed)
    return spec.without_shards()


def _build(processor: Callable[[Any], ShardProcessor], specs: Spec | Mapping[str, Spec]) -> ShardProcessor:
    """Build a worker's processor, on the worker's machine."""
    if isinstance(specs, Spec):
        return processor(_with_threads(specs))
    return processor({name: _with_threads(spec) for name, spec in specs.items()})


def _with_threads(spec: Spec) -> Spec:
    return replace(spec, decode_threads=spec.decode_threads or decode_threads())


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


def _drive(root: str, folders: Sequence[Folder], factory: Factory, options: RunOptions, engine: Engine) -> RunResult:
    run, books = folders[0].run, Books(folders, options.retry_failed)
    pending = [shard for shard in run.shards if books.lacking(shard.name)]
    done = len(run.shards) - len(pending)
    _say_begun(folders, done, len(pending))
    if not pending:
        print(printable(f"nothing to do: all shards of {root} are done"))
        return _result(root, folders, books, Outcome(), done)
    pool = make_pool(engine, factory, options.decode_threads, run.config.torch_threads)
    started = time.monotonic()
    receipts = {name: receipt for it in folders for name, receipt in it.begun.receipts.items()}
    failures = [failure for it in folders for failure in it.begun.failures.values() if failure.kind == DEVICE]
    with Progress(done, len(run.shards), _expected(pending, receipts)) as progress:
        driver = Driver(
            pool,
            books,
            workers=min(engine.workers, len(pending)),
            timeout_s=options.shard_timeout_s,
            max_failed=options.max_failed_shards,
            earlier=books,
            kills={it.shard: it.attempts for it in sorted(failures, key=lambda failure: failure.attempts)},
            tick=progress,
        )
        try:
            outcome = driver.run(pending)
        except KeyboardInterrupt:
            outcome = driver.state.outcome
            outcome.stopped = "interrupted"
    done += len(outcome.receipts)
    names = f" ({', '.join(it.name for it in folders)})" if folders[0].name else ""
    _report(outcome, len(run.shards), done, f"{root}{names}", time.monotonic() - started)
    _say_halved(outcome.receipts.values(), run.config.batch_size)
    # A process without its device may not end by itself either.
    stuck = isinstance(pool, LocalPool) and (pool.abandoned or outcome.device_lost)
    return replace(_result(root, folders, books, outcome, done), stuck=stuck)


def _say_begun(folders: Sequence[Folder], done: int, pending: int) -> None:
    """Say what the runs have."""
    counts = {it.name: sum(shard.name in it.begun.receipts for shard in it.run.shards) for it in folders}
    for it in folders:
        for line in it.begun.notes():
            it.say(line)
        if len(set(counts.values())) > 1:
            it.say(f"{counts[it.name]} of {done + pending} shards done")
    each = " in all runs" if len(folders) > 1 else ""
    print(f"{done} of {done + pending} shards done{each}, {pending} to do", file=sys.stderr)


def _result(root: str, folders: Sequence[Folder], books: Books, outcome: Outcome, done: int) -> RunResult:
    """Judge the rows of each run, and return the result of all."""
    failures = {name: f"{failure.kind}: {failure.reason}" for name, failure in outcome.failures.items()}
    stopped = 130 if outcome.stopped == "interrupted" else AGAIN if outcome.device_lost else 0
    runs = {}
    for it in folders:
        receipts = {**it.begun.receipts, **books.published[it.name]}
        judged = _judge(receipts.values(), it.say)
        lacking = {name: why for name, why in failures.items() if books.lacks(it.name, name)}
        code = stopped or judged or int(bool(lacking or outcome.stopped))
        own = sum(not books.lacks(it.name, shard.name) for shard in it.run.shards)
        rows, finished = _rows(receipts.values()), {name: receipt.digest for name, receipt in receipts.items()}
        runs[it.name] = RunResult(it.root, code, len(it.run.shards), own, rows, lacking, finished)
    if not folders[0].name:
        return runs[""]
    every: Counter[str] = sum((Counter(each.rows) for each in runs.values()), Counter())
    code = max(each.code for each in runs.values())
    return RunResult(root, code, len(folders[0].run.shards), done, dict(every.most_common()), failures, runs=runs)


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
        f"{done}/{shards} shards done in {printable(root)}: {counted(outcome.samples, 'image')} in {clock(seconds)} "
        f"({outcome.samples / seconds:,.1f} images/s); rows: {rows}; time: {shares(outcome.seconds)}"
    )
    if outcome.stopped or outcome.failures:
        why = outcome.stopped or f"{counted(len(outcome.failures), 'shard')} failed"
        lost = f"; {counted(outcome.lost, 'image')} of unfinished shards will be done again" if outcome.lost else ""
        print(f"{printable(why)}; finished shards are kept{lost}: repeat the command to resume", file=sys.stderr)


def _say_halved(receipts: Collection[Receipt], batch_size: int) -> None:
    """Say that memory ran out, if it did."""
    smaller = [receipt.batch_size for receipt in receipts if 0 < receipt.batch_size < batch_size]
    if smaller:
        print(
            f"memory ran out: {len(smaller)} of {len(receipts)} shards were computed in batches of {min(smaller)}, not "
            f"of {batch_size}",
            file=sys.stderr,
        )


def _judge(receipts: Collection[Receipt], say: Callable[[str], None]) -> int:
    """Say why rows are not ok. Return the exit code, 1 if too few are ok."""
    reasons, rows = reasons_of(receipts), _rows(receipts)
    for reason, count in reasons.items():
        say(f"{counted(count, 'row')} {reason}")
    problem = too_few_ok(rows, reasons) if receipts else None
    if problem:
        say(f"FAILED: {problem}")
    return int(problem is not None)


def _rows(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return the rows by status, the most frequent status first."""
    statuses: Counter[str] = sum((Counter(receipt.statuses) for receipt in receipts), Counter())
    return dict(statuses.most_common())
