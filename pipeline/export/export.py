"""Export a run in one of several formats: a resumable job of the engine, each shard whole or not at all."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa

from saltern.pipeline.engine.conduct import Job, RunOptions
from saltern.pipeline.engine.derived import Source, derive, fields_of_model, load_results, reading_results, writing
from saltern.pipeline.export.coco import join_parts
from saltern.pipeline.export.folder import Folder, check, records
from saltern.pipeline.export.labelstudio import write_labels
from saltern.pipeline.export.processor import ExportProcessor
from saltern.pipeline.runs.begin import new_run
from saltern.pipeline.runs.datafile import batches, reading_data
from saltern.pipeline.runs.manifest import load_run, read_receipts, receipt_name
from saltern.pipeline.runs.places import find_shards
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.pipeline.storage.session import session
from saltern.pipeline.storage.store import Store
from saltern.schemas.choices import ExportFormat
from saltern.schemas.config import ExportConfig
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.export import RECORDS
from saltern.schemas.run import Run, Shard

_FIX = "make room, or give another --out"
_THREADS = 32  # that read records


@dataclass
class Exported:
    """The result of an export."""

    shards: int = 0
    rows: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # shard -> reason
    hints: list[str] = field(default_factory=list)  # for the user


def export(path: str, form: str, out: str, patterns: Sequence[str] = (), options: RunOptions | None = None) -> Exported:
    """Write the rows of a run in another format, or go on with that.

    Memory does not grow with the run. A repeated call writes only what is missing, or of data files that the run has
    replaced since.

    Args:
        path: the run's folder or URL.
        form: one of ExportFormat.
        out: folder or URL, new, empty, or with an export of the same run in the same format.
        patterns: some of the run's shards, or where they are now; none = all.
        options: of the execution; `out`, `overwrite` and `device` are not used.

    Returns:
        Counts, and the shards that could not be read, of which nothing is written.

    Raises:
        UserError: the run is not complete, a shard is not one of it, or `out` cannot be used.
        StoppedError: the engine stopped before the end; finished shards are kept.
    """
    run = open_run(path, patterns)
    exported = Exported()
    shards = _wanted(run, patterns, exported)
    if form == ExportFormat.png and "://" in out:
        raise UserError(
            f"--out {out}: png makes a file for each map, too many for an object store; give a local folder"
        )
    check(out, run, form)
    store, root = records(out), f"{out.rstrip('/')}/{RECORDS}"
    job = Job(partial(_plan, run, form, shards), partial(ExportProcessor, source=Source.of(run), out=out))
    chosen = replace(options or RunOptions(out), device="cpu")
    with writing(out, _FIX):
        _forget_lost(store, out)
    results = derive(run, root, job, shards, chosen, _FIX)
    done, exported.failures = results.shards, results.unread
    with writing(out, _FIX), session(store) as owned, reading_results(root):
        _finish(Folder.at(out, owned.scratch), form, run, store, done)
    rows = {shard.name: receipt.rows for shard, receipt in zip(run.shards, run.receipts, strict=True)}
    exported.shards, exported.rows = len(done), sum(rows[shard.name] for shard in done)
    return exported


def _wanted(run: SaliencyRun, patterns: Sequence[str], exported: Exported) -> list[Shard]:
    """Return the shards to export, in the run's order. Raises UserError if the run has not completed one."""
    chosen = {shard.name for shard in run.run.shards}
    if patterns:
        found, exported.hints = find_shards(run.path, run.run, patterns)
        chosen = set(found)
    done = [shard for shard in run.shards if shard.name in chosen]
    if len(done) < len(chosen):
        there = {shard.name for shard in done}
        missing = next(shard for shard in run.run.shards if shard.name in chosen - there)
        raise UserError(
            f"{run.path} is not complete: it lacks {len(chosen) - len(done)} of {len(chosen)} shards, the first is "
            f"{missing.name}; continue with the same `saltern extract` command, or name only completed shards"
        )
    return done


def _plan(
    run: SaliencyRun, form: str, shards: Sequence[Shard], existing: Run | None, device: str, workers: int
) -> tuple[Run, list[str]]:
    """Return the export as a run over the same shards. It computes nothing, so no setting is pinned."""
    made = ExportConfig(
        **fields_of_model(run.config),
        batch_size=1,
        torch_threads=1,
        form=form,
        source=run.run.fingerprint,
    )
    return new_run(made, list(shards), None), []


def _forget_lost(store: Store, out: str) -> None:
    """Remove the receipts of shards whose files are gone or have another size, so that they are written again."""
    made = load_results(store)
    if made is None or made.config_of(ExportConfig).form == ExportFormat.coco:
        return  # the parts of `coco` are the data files, which the engine looks at
    folder = Store(out)
    sizes = {} if folder.local else folder.sizes("")

    def size(name: str) -> int | None:
        if not folder.local:
            return sizes.get(name)
        try:
            return os.stat(folder.full(name)).st_size
        except OSError:
            return None

    def is_lost(shard: str) -> bool:
        try:
            files = (row for part in _read_records(store, made, Shard(shard, "", 0)) for row in part.to_pylist())
            return any(size(row["file"]) != row["bytes"] for row in files)
        except ShardError:
            return True

    names = list(read_receipts(store, made))
    with ThreadPoolExecutor(_THREADS) as threads:
        lost = threads.map(is_lost, names)
        store.remove(receipt_name(name) for name, gone in zip(names, lost, strict=True) if gone)


def _read_records(store: Store, made: Run, shard: Shard) -> Iterator[pa.RecordBatch]:
    with reading_data(store, made, shard) as file:
        yield from batches(file, 512)


def _finish(folder: Folder, form: str, run: SaliencyRun, store: Store, shards: Sequence[Shard]) -> None:
    """Write the files that all shards share."""
    folder.mark(run, form)
    if form == ExportFormat.labelstudio:
        write_labels(folder, run)
    if form == ExportFormat.coco:
        made = load_run(store)
        assert made is not None  # noqa: S101 - the engine has written it
        join_parts(folder, run, (part for shard in shards for part in _read_records(store, made, shard)))
