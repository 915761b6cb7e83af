"""The interface between the processor and a job's task, and the data that they exchange."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.runs.writer import Record
from saltern.pipeline.shards.decode import Decoded, DecodeError
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.errors import DeviceLostError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import NONFINITE, OK, ZERO_MAP

STATUSES = (OK, ZERO_MAP, NONFINITE)  # by the code that a task computes on the device

Decoding = Future[tuple[Decoded, float]]  # with its thread seconds


class Task(Protocol):
    """A job's work on samples.

    The thread that owns the device builds and calls a task; the thread that writes calls `records`.
    """

    schema: pa.Schema  # of the data files; has the columns key, shard, index, status and error

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> "Pending":
        """Start one batch: pixels uint8, labels and seeds int64, all on the host."""

    def problem(self, sample: Sample) -> tuple[str, str] | None:
        """Return status and reason if the task cannot use a sample with an image, else None."""

    def records(self, shard: Shard, batch: "list[Item]", explained: "Explained | None") -> list[Record]:
        """Return the records of a decoded batch, in its order; `explained` is None if no item was decoded."""

    def close(self) -> None:
        """Release what the task holds on the device."""


@dataclass
class Item:
    """A sample of a batch: in decoding, failed before the method, or with records of an earlier run."""

    sample: Sample
    decoding: Decoding | None = None
    problem: tuple[str, str] | None = None  # status, reason
    kept: list[Record] | None = None
    decoded: Decoded | None = None

    def wait(self) -> float:
        """Wait for the decoding and return its thread seconds."""
        if self.decoding is None:
            return 0.0
        try:
            self.decoded, seconds = self.decoding.result()
        except DecodeError as error:
            self.problem, seconds = (error.status, error.reason), 0.0
        self.decoding = None  # an error's traceback holds the image's bytes
        return seconds


@dataclass(frozen=True)
class Explained:
    """Results of one batch, on the host. R = B * targets rows; the rows of a sample are adjacent."""

    columns: dict[str, NDArray[Any]]
    statuses: list[str]  # of each row

    @classmethod
    def concatenate(cls, parts: "list[Explained]") -> "Explained":
        """Join the parts into which a batch was split."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        joined = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        return cls(joined, [status for part in parts for status in part.statuses])


# Columns of one row from (its decoded image, the columns of its batch, its number in them, its status).
Describe = Callable[[Decoded, dict[str, NDArray[Any]], int, str], Record]


def assemble(
    shard: Shard,
    items: Sequence[Item],
    explained: Explained | None,
    describe: Describe,
    reasons: Mapping[str, str],
    each: int = 1,
) -> list[Record]:
    """Return the records of a batch, in the order of its items.

    Args:
        shard: of the items.
        items: decoded, failed or kept.
        explained: results of the decoded items, `each` rows for one; None if no item was decoded.
        describe: returns the columns that the job adds to a row.
        reasons: the column `error` by status.
        each: rows of a decoded sample.
    """
    records: list[Record] = []
    row = 0
    for item in items:
        sample, decoded = item.sample, item.decoded
        identity = {"key": sample.key, "shard": shard.name, "index": sample.index, "label": sample.label}
        if item.kept is not None:
            records += item.kept
        elif decoded is None or explained is None:
            status, reason = item.problem or ("", "")
            records.append({**identity, "status": status, "error": reason})
        else:
            identity |= {"image_height": decoded.image_height, "image_width": decoded.image_width}
            for number in range(row, row + each):
                status = explained.statuses[number]
                columns = describe(decoded, explained.columns, number, status)
                end = {"geometry": list(decoded.geometry), "status": status, "error": reasons.get(status)}
                records.append({**identity, **columns, **end})
            row += each
    return records


class Pending:
    """Results during their copy to the host. `wait` blocks the caller, not the device's thread."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._started = self._mark()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def send(self, columns: dict[str, Tensor]) -> "Pending":
        """Start the copies to the host."""
        self._columns = {name: self._to_host(column) for name, column in columns.items()}
        self._ended = self._mark()
        return self

    def _to_host(self, column: Tensor) -> Tensor:
        if not self._cuda:
            return column
        return torch.empty(column.shape, dtype=column.dtype, pin_memory=True).copy_(column, non_blocking=True)

    def wait(self) -> tuple[Explained, float]:
        """Return the results and the seconds that the device spent on them."""
        if self._cuda:
            self._ended.synchronize()
            seconds = self._started.elapsed_time(self._ended) / 1000
        else:
            seconds = self._ended - self._started
        columns = {name: column.numpy() for name, column in self._columns.items()}
        return Explained(columns, [STATUSES[code] for code in columns.pop("status").tolist()]), seconds


def out_of_memory(error: Exception) -> bool:
    """Return whether torch raised the error because an allocation failed, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def device_losses() -> Iterator[None]:
    """Raise DeviceLostError for a CUDA error, which leaves the process unusable."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error) or "CUBLAS" in str(error):
            raise DeviceLostError(str(error).splitlines()[0]) from error
        raise
