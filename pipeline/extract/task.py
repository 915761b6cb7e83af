"""What the processor and the jobs that it runs hand to each other."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.runs.writer import Row
from saltern.pipeline.shards.decode import Decoded, DecodeError
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.errors import DeviceLostError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import NONFINITE, OK, ZERO_MAP

_STATUS = (OK, ZERO_MAP, NONFINITE)


Decoding = Future[tuple[Decoded, float]]  # with its thread seconds


@dataclass
class Item:
    """A sample that is being decoded, has failed before the method, or is kept from an earlier run."""

    sample: Sample
    decoding: Decoding | None = None
    problem: tuple[str, str] | None = None  # status, reason
    kept: list[Row] | None = None
    decoded: Decoded | None = None

    def settle(self) -> float:
        """Wait for the decoding; returns its thread seconds."""
        if self.decoding is None:
            return 0.0
        try:
            self.decoded, seconds = self.decoding.result()
        except DecodeError as error:
            self.problem, seconds = (error.status, error.reason), 0.0
        return seconds


@dataclass(frozen=True)
class Explained:
    """What one batch gave, on the host; R = B * targets, all targets of a sample in a run."""

    columns: dict[str, NDArray[Any]]
    statuses: list[str]  # of each row

    @classmethod
    def concatenate(cls, parts: "list[Explained]") -> "Explained":
        """One batch of the parts into which it was split."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        joined = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        return cls(joined, [status for part in parts for status in part.statuses])


class Pending:
    """Results on their way to the host. `wait` blocks the caller, not the device's thread."""

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
        self._columns = {name: self._to_host(column) for name, column in columns.items()}
        self._ended = self._mark()
        return self

    def _to_host(self, column: Tensor) -> Tensor:
        if not self._cuda:
            return column
        return torch.empty(column.shape, dtype=column.dtype, pin_memory=True).copy_(column, non_blocking=True)

    def wait(self) -> tuple[Explained, float]:
        """The results, and the seconds that the device spent on them."""
        if self._cuda:
            self._ended.synchronize()
            seconds = self._started.elapsed_time(self._ended) / 1000
        else:
            seconds = self._ended - self._started
        columns = {name: column.numpy() for name, column in self._columns.items()}
        return Explained(columns, [_STATUS[code] for code in columns.pop("status").tolist()]), seconds


class Task(Protocol):
    """What a job does with samples; made and called in the thread that owns the device, but for `rows`."""

    schema: pa.Schema  # of the data files; begins with key, shard, index, ends with status, error

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        """Begin one batch, on the host as yet: pixels uint8, labels and seeds int64."""

    def problem(self, sample: Sample) -> tuple[str, str] | None:
        """Status and reason where a sample with an image cannot be worked on all the same."""

    def rows(self, shard: Shard, batch: list[Item], found: Explained | None) -> list[Row]:
        """Rows of a settled batch, in its order."""


@contextlib.contextmanager
def device_losses() -> Iterator[None]:
    """A CUDA error leaves the process unusable: said as what it means."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error) or "CUBLAS" in str(error):
            raise DeviceLostError(str(error).splitlines()[0]) from error
        raise
