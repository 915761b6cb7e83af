"""What a worker of any job needs to be built, and how it hands in a shard: the data file first, the receipt last."""

import contextlib
import errno
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from saltern.pipeline.runs.manifest import data_name, publish_receipt
from saltern.pipeline.runs.writer import Row, ShardWriter, Written
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import OutputError
from saltern.schemas.receipt import PHASES, Receipt
from saltern.schemas.run import Run, Shard

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Spec:
    """What a worker needs to build its processor. Travels to other machines."""

    run: Run
    root: str  # the run's folder
    scratch: str  # this session's folder for unfinished files
    device: str
    decode_threads: int


@dataclass
class Tally:
    """What one shard's receipt will say."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    statuses: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - since

    def count(self, samples: int, rows: list[Row]) -> None:
        self.samples += samples
        self.statuses.update(row[-2] for row in rows)


class Outlet:
    """A worker's way into the run's folder."""

    def __init__(self, spec: Spec):
        self.store, self._scratch = Store(spec.root), Path(spec.scratch)
        self._fingerprint = spec.run.fingerprint
        if not self.store.local:
            self._scratch.mkdir(parents=True, exist_ok=True)  # the driver's lies on the driver's machine

    @contextlib.contextmanager
    def writing(self, tally: Tally) -> Iterator[None]:
        """Time spent on output. Raises OutputError where the folder takes no more."""
        try:
            with tally.phase("write"):
                yield
        except OSError as error:
            if error.errno in _FULL:
                raise OutputError(f"cannot write to {self.store.path}: {os.strerror(error.errno)}") from error
            raise

    def open(self, schema: pa.Schema, tally: Tally) -> ShardWriter:
        with self.writing(tally):
            return ShardWriter(self._scratch, schema)

    def publish(self, content: bytes, name: str, tally: Tally) -> None:
        """A file beside the data, whole."""
        with self.writing(tally):
            made = self._scratch / uuid.uuid4().hex
            made.write_bytes(content)
            self.store.publish(made, name)

    def close(self, shard: Shard, writer: ShardWriter, tally: Tally) -> Written:
        """The data file under its name."""
        with self.writing(tally):
            written = writer.close()
            self.store.publish(written.path, data_name(shard.name))
        return written

    def hand_in(self, shard: Shard, written: Written, tally: Tally, batch_size: int) -> Receipt:
        """The receipt: from here on the shard is done."""
        receipt = Receipt(
            shard=shard.name,
            size=shard.size,
            fingerprint=self._fingerprint,
            samples=tally.samples,
            rows=written.rows,
            statuses=dict(sorted(tally.statuses.items())),
            digest=written.digest,
            data_bytes=written.size,
            seconds={**tally.seconds, "total": time.perf_counter() - tally.started},
            worker=f"{socket.gethostname()}:{os.getpid()}",
            batch_size=batch_size,
        )
        with self.writing(tally):
            publish_receipt(self.store, receipt, self._scratch)
        return receipt


def origin(run: Run) -> dict[str, Any]:
    """What every data file says of the run that it belongs to."""
    return {"fingerprint": run.fingerprint, "config": run.config.marked(), "versions": run.versions}
