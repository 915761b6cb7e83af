"""The interface between the processor and a job's task, and the data that they exchange."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.run import Shard
from saltern.schemas.saliency import NONFINITE, OK, ZERO_MAP

STATUSES = (OK, ZERO_MAP, NONFINITE)  # by the code that a task computes on the device


class Task(Protocol):
    """A job's work on samples.

    The thread that owns the device builds and calls a task; the thread that writes calls `rows`.
    """

    schema: pa.Schema  # of the data files; has the columns key, shard, index, status and error
    team: Hashable = None  # tasks of an equal team share their passes in `together`; None: shares none

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> "Pending":
        """Start one batch: labels and seeds int64, on the host; pixels uint8, where the decoder leaves them."""

    def together(self, others: Sequence[Any], *inputs: Tensor) -> "list[Pending]":
        """Start one batch for this task and others of its team; `inputs` as for a call."""
        return [task(*inputs) for task in (self, *others)]

    def problem(self, sample: Sample, label: int | None) -> tuple[str, str] | None:
        """Return status and reason if the task cannot use a sample with an image, else None; `label` is its label."""

    def rows(self, shard: Shard, batch: Batch, explained: "Explained | None") -> pa.RecordBatch:
        """Return the rows of a decoded batch, in its order; `explained` is None if no sample was decoded."""

    def close(self) -> None:
        """Release what the task holds on the device."""


@dataclass(frozen=True)
class Explained:
    """Results of one batch, on the host. R = B * targets rows; the rows of a sample are adjacent."""

    columns: dict[str, NDArray[Any]]
    status_R: NDArray[np.int64]  # noqa: N815 - in STATUSES

    @classmethod
    def concatenate(cls, parts: "list[Explained]") -> "Explained":
        """Join the parts into which a batch was split."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        joined = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        return cls(joined, np.concatenate([part.status_R for part in parts]))


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
        return Explained(columns, columns.pop("status")), seconds
