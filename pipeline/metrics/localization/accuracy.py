"""MaxBoxAcc and MaxBoxAccV2 of a dataset, from the hits of its samples.

Shape suffixes: N samples, I the four of maxbox.IOUS, S bytes of packed bits, L levels, D draws.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization.levels import LEVELS
from saltern.pipeline.metrics.localization.maxbox import BYTES, IOUS
from saltern.pipeline.metrics.resampling import DrawnSums, interval

THRESHOLDS = np.arange(0, 1, 0.001)  # clovaai's list
_TOGETHER = 1024  # samples that are unpacked together


@dataclass(frozen=True)
class Best:
    """An accuracy at its best threshold, which is an oracle's choice: it is chosen on the same samples."""

    value: float  # in [0, 1]
    low: float  # of the 95 % interval
    high: float
    thresholds: tuple[float, ...]  # one for each IoU, the smallest of equally good ones; in [0, 1) of the map's range


class BoxAccuracies:
    """The share of hits at each level, of all samples and of bootstrap draws, without keeping the samples.

    The best thresholds are chosen again within each draw. See DrawnSums.
    """

    def __init__(self, draws: int = 1000, seed: int = 0):
        self._hits = DrawnSums((len(IOUS), LEVELS), draws, seed)

    @property
    def samples(self) -> int:
        """The number of samples that were added."""
        return self._hits.samples

    def add(self, hits_NIS: NDArray[np.uint8]) -> None:
        """Add samples, as `box_hits` returns them; zeros for a sample without a map."""
        if hits_NIS.shape[1:] != (len(IOUS), BYTES):
            raise ValueError(f"hits of shape {hits_NIS.shape} are not (N, {len(IOUS)}, {BYTES})")
        for start in range(0, len(hits_NIS), _TOGETHER):
            self._hits.add(np.unpackbits(hits_NIS[start : start + _TOGETHER], axis=2, count=LEVELS))

    def max_box_acc(self) -> Best:
        """Return MaxBoxAcc: the largest box, IoU >= 0.5."""
        return self._best(slice(0, 1))

    def max_box_acc_v2(self) -> Best:
        """Return MaxBoxAccV2: all boxes, the mean over IoU >= 0.3, 0.5 and 0.7, each at its own best threshold."""
        return self._best(slice(1, 4))

    def _best(self, which: slice) -> Best:
        share_IL = self._hits.sums[which] / max(self.samples, 1)
        best_D = self._hits.drawn_sums[:, which].max(2).mean(1) / np.maximum(self._hits.drawn_samples_D, 1)
        thresholds = tuple(threshold_of(int(level)) for level in share_IL.argmax(1))
        return Best(float(share_IL.max(1).mean()), *interval(best_D), thresholds)


def levels_of(thresholds: Iterable[float]) -> list[int]:
    """Return the level at which clovaai cuts an 8-bit map of maximum 255, for each threshold."""
    return [int(threshold * 255) for threshold in thresholds]


def threshold_of(level: int) -> float:
    """Return the smallest of the 1,000 thresholds that cut at a level."""
    return float(THRESHOLDS[levels_of(THRESHOLDS).index(level)])
