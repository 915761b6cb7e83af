"""The contract of a family of metrics: measures that share their input, and are computed in one pass over a run.

Shape suffixes: N samples of a batch, M measured ones, H W the network's input, C channels.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import ColumnMeans, Estimate
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.metrics import Metric


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a shard under one subject."""

    subject: str
    samples: list[Sample]
    rows: list[Row]  # the first row of each sample; of a control, with its map, mask and box
    pixels_MHWC: Tensor | None  # uint8, of the samples whose row has a geometry; None if the family needs none
    begun: Any = None  # what `Family.begin` returned


class Summary(Protocol):
    """The sums of a family's metrics over samples, by subject."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the data files that it needs."""

    def add(self, subject: str, rows: pa.RecordBatch) -> None:
        """Add rows of a subject, in the order of the shards."""

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Return the estimate of each metric by subject."""


class Family:
    """Base of the families. A worker builds one and calls it with batches.

    Args:
        config: of the run that is judged.
        how: config of the evaluation.
        device: that computes.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]  # by the column that they average
    needs_pixels: ClassVar[bool] = False
    runs_network: ClassVar[bool] = False
    takes_classifiers: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False  # images by maps
    members: ClassVar[frozenset[str]] = frozenset()  # extensions that it reads of the samples, besides the run's

    def __init__(self, config: ExtractConfig, how: EvaluateConfig, device: torch.device):
        self.config, self.how, self.device = config, how, device

    @classmethod
    def check(cls, path: str, config: ExtractConfig) -> None:
        """Raise UserError if a run of this config cannot be measured."""

    @classmethod
    def check_census(cls, path: str, census: Census, unread: Mapping[str, str]) -> None:
        """Raise UserError if all shards were read and no sample could be judged."""

    def begin(self, batch: Batch, pool: Executor) -> Any:
        """Start work of the CPU that `measure` will need, up to some batches ahead. Called in another thread."""

    def measure(self, batch: Batch) -> list[Record]:
        """Return the values of each sample, by column; a record may replace `status` and `error` of its row."""
        raise NotImplementedError

    @classmethod
    def summary(cls, store: Store) -> Summary:
        """Return an empty summary of the family's metrics, for the results in a store."""
        return ColumnMeans(list(cls.metrics))

    @classmethod
    def draw(cls, found: Mapping[str, Mapping[str, Estimate]]) -> bytes | None:
        """Return a PNG of the estimates of the run and of the controls, by subject; None if the family has no plot."""
        return None
