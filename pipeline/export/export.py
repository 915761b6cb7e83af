"""Export a run: its shards one after the other, each whole or not at all, in one of several formats."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from saltern.pipeline.export.arrays import write_arrays
from saltern.pipeline.export.coco import annotations
from saltern.pipeline.export.facts import Take
from saltern.pipeline.export.folder import Folder, opened
from saltern.pipeline.export.labelstudio import tasks
from saltern.pipeline.export.pictures import write_pictures
from saltern.pipeline.export.sidecars import write_sidecar
from saltern.pipeline.runs.places import find_shards
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.schemas.choices import ExportFormat
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard
from saltern.schemas.text import counted

EVERY_S = 10.0  # between two lines of progress
Format = Callable[[Folder, SaliencyRun], AbstractContextManager[Take]]


@dataclass
class Exported:
    """The result of an export."""

    shards: int = 0
    rows: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # shard -> reason
    hints: list[str] = field(default_factory=list)  # for the user


def export(path: str, form: str, out: str, patterns: Sequence[str] = ()) -> Exported:
    """Write the rows of a run in another format.

    Memory does not grow with the run. A repeated call writes the same files again.

    Args:
        path: the run's folder or URL.
        form: one of ExportFormat.
        out: folder or URL, new, empty, or with an export of the same run in the same format.
        patterns: some of the run's shards, or where they are now; none = all.

    Returns:
        Counts, and the shards that could not be read, of which nothing is written.

    Raises:
        UserError: the run is not complete, a shard is not one of it, or `out` cannot be used.
    """
    run = open_run(path, patterns)
    exported = Exported()
    shards = _wanted(run, patterns, exported)
    if form == ExportFormat.png and "://" in out:
        raise UserError(
            f"--out {out}: png makes a file for each map, too many for an object store; give a local folder"
        )
    line = _Line(len(shards))
    with opened(out, run, form) as folder, FORMATS[form](folder, run) as take:
        for shard in shards:
            try:
                exported.rows += take(shard)
                exported.shards += 1
            except (ShardError, ValueError) as error:  # ValueError: of a row that lacks what its map needs
                exported.failures[shard.name] = str(error)
            line.tick(exported)
    return exported


def _wanted(run: SaliencyRun, patterns: Sequence[str], exported: Exported) -> list[Shard]:
    """Return the shards to export, in the run's order. Raises UserError if the run has not completed one."""
    chosen = {shard.name for shard in run.run.shards}
    if patterns:
        found, exported.hints = find_shards(run.path, run.run, patterns)
        chosen = set(found)
    done = [shard for shard in run.shards if shard.name in chosen]
    if len(done) < len(chosen):
        missing = next(shard for shard in run.run.shards if shard.name in chosen and shard not in done)
        raise UserError(
            f"{run.path} is not complete: {len(chosen) - len(done)} of {len(chosen)} shards are missing, the first is "
            f"{missing.name}; continue with the same `saltern extract` command, or name only completed shards"
        )
    return done


def _each(write: Callable[[Folder, SaliencyRun, Shard], int]) -> Format:
    """Return the format in which each shard has files that need nothing of the others."""

    @contextmanager
    def begin(folder: Folder, run: SaliencyRun) -> Iterator[Take]:
        yield lambda shard: write(folder, run, shard)

    return begin


FORMATS: dict[str, Format] = {
    ExportFormat.wds: _each(write_sidecar),
    ExportFormat.npy: _each(write_arrays),
    ExportFormat.png: _each(write_pictures),
    ExportFormat.coco: annotations,
    ExportFormat.labelstudio: tasks,
}


class _Line:
    """Lines of progress on stderr."""

    def __init__(self, shards: int):
        self._shards = shards
        self._started = self._last = time.monotonic()

    def tick(self, so_far: Exported) -> None:
        now = time.monotonic()
        if now - self._last < EVERY_S:
            return
        self._last = now
        done = so_far.shards + len(so_far.failures)
        left = (now - self._started) / done * (self._shards - done)
        print(
            f"{done:,}/{self._shards:,} shards | {counted(so_far.rows, 'row')} | "
            f"{so_far.rows / (now - self._started):,.0f} rows/s | ETA {left / 60:.0f} min",
            file=sys.stderr,
            flush=True,
        )
