"""Estimate means over samples with their 95 % bootstrap intervals, without keeping the samples.

Shape suffixes: D draws of the bootstrap, N rows, C columns.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saltern.pipeline.metrics.resampling import DrawnSums, interval


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95 % interval."""

    value: float  # NaN without values
    low: float
    high: float
    count: int  # samples that have a value
    std: float | None = None  # of the values, over samples; None if the statistic is no mean of values

    @property
    def plus_minus(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def to_dict(self) -> dict[str, Any] | None:
        """Return the numbers as JSON; None without values."""
        if not self.count:
            return None
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count, "std": self.std}


class Means:
    """Means of columns and their intervals, without keeping the rows; NaN is no value."""

    def __init__(self, columns: int):
        self._sums = DrawnSums((2, columns))  # of the values, and of how many there are
        self._squares_C = np.zeros(columns)

    def add(self, values_NC: NDArray[np.float64]) -> None:
        """Add rows."""
        there_NC = ~np.isnan(values_NC)
        known_NC = np.where(there_NC, values_NC, 0)
        self._sums.add(np.stack([known_NC, there_NC], 1))
        self._squares_C += (known_NC**2).sum(0)

    def estimates(self) -> list[Estimate]:
        """Return the estimate of each column."""
        (sum_C, count_C), (sum_DC, count_DC) = self._sums.sums, self._sums.drawn_sums.swapaxes(0, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_C, mean_DC = sum_C / count_C, sum_DC / count_DC
            std_C = np.sqrt((self._squares_C / count_C - mean_C**2).clip(0))
        ends = [interval(mean_D) for mean_D in mean_DC.T]
        columns = zip(mean_C, ends, count_C, std_C, strict=True)
        return [Estimate(float(mean), *own, int(count), float(std)) for mean, own, count, std in columns]


class ColumnMeans:
    """The mean of each column by subject; nulls do not count."""

    def __init__(self, columns: Sequence[str]):
        self.columns = columns
        self._sums = defaultdict[str, Means](lambda: Means(len(columns)))

    def add(self, subject: str, rows: pa.RecordBatch) -> None:
        """Add rows of a subject."""
        columns = [rows[name].to_numpy(zero_copy_only=False) for name in self.columns]  # a null becomes NaN
        self._sums[subject].add(np.stack(columns, 1).astype(np.float64))

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Return the estimate of each column by subject."""
        return {subject: dict(zip(self.columns, own.estimates(), strict=True)) for subject, own in self._sums.items()}
