"""The output of a worker: it publishes the data file of a shard first, then the shard's receipt."""

import contextlib
import errno
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from saltern.pipeline.runs.manifest import data_name, receipt_name
from saltern.pipeline.runs.reasons import Reasons
from saltern.pipeline.runs.writer import Record, ShardWriter, Written
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
    scratch: str  # the session's folder for unfinished files
    device: str  # cpu | cuda
    decode_threads: int


@dataclass
class Tally:
    """Counts and times of one shard, for its receipt."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Reasons = field(default_factory=Reasons)
    samples: int = 0
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the `with` to a phase."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - since

    def count(self, samples: int, records: list[Record]) -> None:
        self.samples += samples
        self.statuses.update(record["status"] for record in records)
        for record in records:
            if record["status"] != OK:
                self.reasons.add(f"{record['status']}: {record.get('error')}")


class Outlet:
    """The access of a worker to the run's folder."""

    def __init__(self, spec: Spec):
        self.store, self._scratch = Store(spec.root), Path(spec.scratch)
        self._fingerprint = spec.run.fingerprint
        if not self.store.local:
            self._scratch.mkdir(parents=True, exist_ok=True)  # the driver created it only on its own machine

    @contextlib.contextmanager
    def writing(self, tally: Tally) -> Iterator[None]:
        """Measure time spent on output. Raises OutputError if the folder accepts no more data."""
        try:
            with tally.phase("write"):
                yield
        except OSError as error:
            if error.errno in _FULL:
                raise OutputError(f"cannot write to {self.store.path}: {os.strerror(error.errno)}") from error
            raise

    def open(self, schema: pa.Schema, tally: Tally) -> ShardWriter:
        """Start a data file in the scratch folder."""
        with self.writing(tally):
            return ShardWriter(self._scratch, schema)

    def publish(self, content: bytes, name: str, tally: Tally) -> None:
        """Publish one more file of the run."""
        with self.writing(tally):
            self.store.write(name, content)

    def close(self, shard: Shard, writer: ShardWriter, tally: Tally) -> Written:
        """Finish the data file and publish it under its name."""
        with self.writing(tally):
            written = writer.close()
            self.store.publish(written.path, data_name(shard.name))
        return written

    def hand_in(self, shard: Shard, written: Written, tally: Tally, batch_size: int) -> Receipt:
        """Publish the receipt, which marks the shard as done."""
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
        )
        with self.writing(tally):
            self.store.write(receipt_name(shard.name), receipt.to_json())
        return receipt


def origin(run: Run) -> dict[str, Any]:
    """Return the metadata of every data file about its run."""
    return {"fingerprint": run.fingerprint, "config": run.config.marked(), "versions": run.versions}
