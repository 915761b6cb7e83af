"""Jobs over the shards of a run, whose results derive from its data files and can be made again."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from saltern.pipeline.engine.conduct import Job, RunOptions, RunResult, conduct
from saltern.pipeline.runs.manifest import load_run
from saltern.pipeline.runs.measured import is_of
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.storage.session import session
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import RunConfig
from saltern.schemas.errors import OutputError, ShardError, UserError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run, Shard


class StoppedError(Exception):
    """The engine stopped before the end: interrupted, or without its device or its folder. The same command goes on."""

    def __init__(self, result: RunResult):
        super().__init__(result.path)
        self.result = result


@dataclass(frozen=True)
class Derived:
    """The results of a job over the shards of a run."""

    store: Store
    shards: list[Shard]  # that are done
    digests: Mapping[str, str]  # of their data files, by the shard's name
    unread: dict[str, str]  # shards that could not be read, with the reason


class DoneRun(Protocol):
    """A run with its shards that are done, as `runs.reader.SaliencyRun`."""

    path: str
    store: Store
    run: Run
    given: frozenset[str]
    shards: list[Shard]
    receipts: list[Receipt]


@dataclass(frozen=True)
class Source:
    """The run that a job reads. It travels to the workers."""

    path: str
    run: Run  # without its shards
    trusted: frozenset[str]  # shards whose tars the user named

    @classmethod
    def of(cls, run: DoneRun) -> "Source":
        """Return the source of an open run."""
        return cls(run.path, replace(run.run, shards=[]), run.given)

    def open(self) -> SaliencyRun:
        """Open the run, which is an extraction, for reading single shards."""
        return SaliencyRun(self.path, Store(self.path), self.run, {}, self.trusted)


@contextlib.contextmanager
def reading_tar(shard: Shard) -> Iterator[None]:
    """Raise ShardError, with the fix, if the tar is gone or not for this user. Other errors are worth a retry."""
    try:
        yield
    except FileNotFoundError as error:
        raise ShardError(f"{shard.url} is gone; if the tars were moved, name them with --shards") from error
    except PermissionError as error:
        raise ShardError(f"{shard.url} may not be read: {error.strerror}") from error


def derive(run: DoneRun, root: str, job: Job, shards: Sequence[Shard], options: RunOptions, fix: str) -> Derived:
    """Run a job over shards of a run, or resume it. Results of data files that the run has replaced are made again.

    Args:
        run: whose data files the job reads.
        root: folder or URL of the results.
        job: its receipts have the content of `runs.measured.is_of`, and as many samples as the shard that was read.
        shards: of the run, as the job's plan has them.
        options: of the execution; `out` is not used.
        fix: for the user, if the results cannot be written.

    Raises:
        UserError: the results cannot be written, are damaged, or another command writes them; or as the job.
        StoppedError: the engine stopped before the end; finished shards are kept.
    """
    store = Store(root)
    store.read("run.json")  # names a file that is in the way of the folder
    with writing(root, fix), session(store):  # nothing is changed while another command writes there
        overwrite = _prepare(store, job.plan, run)
    made = {shard.name: receipt for shard, receipt in zip(run.shards, run.receipts, strict=True)}
    own = replace(job, objection=partial(_objection, {shard.name: shard for shard in shards}, made))
    # Only results go to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        result = conduct(own, replace(options, out=root, overwrite=overwrite))
    if result.code not in (0, 1) or result.done + len(result.failures) < result.shards:
        raise StoppedError(result)
    done = [shard for shard in shards if shard.name in result.finished]
    return Derived(store, done, result.finished, result.failures)


@contextlib.contextmanager
def writing(path: str, fix: str) -> Iterator[None]:
    """Raise UserError, with the fix, for an error of the folder of the results."""
    try:
        yield
    except (OSError, OutputError) as error:
        raise UserError(f"{path}: the results cannot be written there: {error}; {fix}") from error


@contextlib.contextmanager
def reading_results(root: str) -> Iterator[None]:
    """Raise UserError, with the fix, for a damaged file of the results."""
    try:
        yield
    except ShardError as error:
        raise UserError(f"{error}; remove {root} and repeat the command: it is made again") from error


def _prepare(store: Store, plan: Callable[[Run | None, str, int], tuple[Run, list[str]]], source: DoneRun) -> bool:
    """Return whether the results that are there are of another config, and are to be replaced."""
    existing = load_results(store)
    if existing is None:
        # Older versions wrote a file for each shard here.
        made = {shard.name for shard in source.shards}
        store.remove(name for name in store.listing("", ".parquet") if name.removesuffix(".parquet") in made)
        return False
    run = plan(existing, "cpu", 1)[0]
    if existing.config.differences(run.config):
        return True
    if existing.shards != run.shards:  # others of the run's, or at other places
        store.write("run.json", run.to_json())
    return False


def load_results(store: Store) -> Run | None:
    """Return the run in the folder. Raise UserError, with the fix, if it cannot be read."""
    try:
        return load_run(store)
    except UserError as error:
        raise UserError(f"{error}; remove {store.full('')} and repeat the command: it is made again") from error


def _objection(shards: Mapping[str, Shard], made: Mapping[str, Receipt], receipt: Receipt) -> str | None:
    """Return why a result does not hold any more: of a data file that the run has replaced, or of other samples."""
    shard, own = shards[receipt.shard], made[receipt.shard]
    if not is_of(receipt, own.digest):
        return "its data file was made again"
    samples = own.samples if shard.take is None else min(own.samples, shard.take)
    return None if receipt.samples == samples else f"it holds {receipt.samples:,} samples, and {samples:,} are wanted"


def fields_of_model(config: RunConfig) -> dict[str, Any]:
    """Return the fields of the run's model, which a job on its results keeps."""
    names = ("model", "weights", "weights_digest", "classes", "prompts", "preprocess", "seed")
    return {name: getattr(config, name) for name in names}
