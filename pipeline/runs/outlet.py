"""The output of a worker: files in the scratch folder, and their receipt, for the driver to publish."""

import contextlib
import errno
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.reasons import Reasons
from saltern.pipeline.runs.writer import ShardWriter
from saltern.pipeline.storage.session import own_folder
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import OutputError
from saltern.schemas.receipt import PHASES, Receipt
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import OK

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Spec:
    """The data from which a worker builds its processor. It travels to other machines."""

    run: Run
    root: str  # the run's folder
    scratch: str  # the session's folder for unfinished files, a name in the run's folder
    device: str  # cpu | cuda
    decode_threads: int  # of each worker; 0: as many as its machine has cores
    retry_failed: bool = False  # redo the rows that are not ok

    def without_shards(self) -> "Spec":
        """Return the part that a worker needs. The list of shards, which grows with the run, is not in it."""
        return replace(self, run=replace(self.run, shards=[]))


@dataclass
class Tally:
    """Counts and times of one shard, for its receipt."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Reasons = field(default_factory=Reasons)
    samples: int = 0
    content: int | None = None  # CRC-32 of the samples read so far; None if the shard is no tar
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the `with` to a phase."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - since

    def count(self, samples: int, rows: pa.RecordBatch) -> None:
        """Add samples and their rows."""
        self.samples += samples
        if pc.all(pc.equal(rows["status"], OK)).as_py():
            self.statuses[OK] += rows.num_rows
            return
        table = pa.table({"status": rows["status"], "error": rows["error"]})
        counted = table.group_by(table.column_names, use_threads=False).aggregate([([], "count_all")])
        for row in counted.to_pylist():
            self.statuses[row["status"]] += row["count_all"]
            if row["status"] != OK:
                self.reasons.add(f"{row['status']}: {row['error']}", row["count_all"])


@dataclass(frozen=True)
class Made:
    """The output of a worker for one shard. Only the driver publishes, so an abandoned worker can publish nothing."""

    receipt: Receipt
    files: dict[str, str]  # finished scratch files by the names that they get in the run; the data file is last

    @property
    def parts(self) -> "dict[str, Made]":
        return {"": self}


@dataclass(frozen=True)
class MadeTogether:
    """The outputs of a worker for one shard of several runs, by the run's name."""

    parts: dict[str, Made]

    @property
    def receipt(self) -> Receipt:
        """A receipt for counts and times: rows and seconds of all parts, samples of the shard."""
        receipts = [made.receipt for made in self.parts.values()]
        return replace(
            receipts[0],
            rows=sum(receipt.rows for receipt in receipts),
            statuses=dict(sum((Counter(receipt.statuses) for receipt in receipts), Counter())),
            seconds={name: sum(receipt.seconds[name] for receipt in receipts) for name in receipts[0].seconds},
            batch_size=min(receipt.batch_size for receipt in receipts),
        )


Earlier = Receipt | Mapping[str, Receipt | None] | None  # of a shard; with several runs of those that lack it, by name


@contextlib.contextmanager
def accepted(store: Store) -> Iterator[None]:
    """Raise OutputError for an error that says that the run's folder accepts no more data."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(f"cannot write to {store.path}: {os.strerror(error.errno)}") from error
        raise


class Outlet:
    """The access of a worker to the scratch folder of the run."""

    def __init__(self, spec: Spec):
        self.store, self._scratch = Store(spec.root), spec.scratch
        self._fingerprint = spec.run.fingerprint
        if self.store.local:
            self.store.scratch = spec.scratch
        self._folder = Path(self.store.full(spec.scratch)) if self.store.local else own_folder()

    @contextlib.contextmanager
    def writing(self, tally: Tally) -> Iterator[None]:
        """Measure time spent on output. Raises OutputError if the folder accepts no more data."""
        with accepted(self.store), tally.phase("write"):
            yield

    def open(self, schema: pa.Schema, tally: Tally) -> ShardWriter:
        """Start a data file in the scratch folder."""
        with self.writing(tally):
            return ShardWriter(self._folder, schema)

    def add(self, content: bytes, tally: Tally) -> str:
        """Write one more file of the shard. Return its name in the scratch folder."""
        name = f"{self._scratch}/{uuid.uuid4().hex}"
        with self.writing(tally):
            self.store.write(name, content)
        return name

    def close(
        self, shard: Shard, writer: ShardWriter, tally: Tally, batch_size: int, more: dict[str, str] | None = None
    ) -> Made:
        """Finish the data file and make its receipt.

        Args:
            batch_size: as used at the end.
            more: scratch files that `add` wrote, by the names that they get in the run.
        """
        with self.writing(tally):
            written = writer.close()
            source = f"{self._scratch}/{written.path.name}"
            if not self.store.local:
                self.store.write(source, written.path.read_bytes())
                written.path.unlink()
        receipt = Receipt(
            shard=shard.name,
            size=shard.size,
            fingerprint=self._fingerprint,
            samples=tally.samples,
            rows=written.rows,
            statuses=dict(sorted(tally.statuses.items())),
            reasons=tally.reasons.top(),
            digest=written.digest,
            data_bytes=written.size,
            seconds={**tally.seconds, "total": time.perf_counter() - tally.started},
            worker=f"{socket.gethostname()}:{os.getpid()}",
            batch_size=batch_size,
            mtime_ns=shard.mtime_ns,
            content=None if tally.content is None else f"{tally.content:08x}",
        )
        return Made(receipt, {**(more or {}), data_name(shard.name): source})
