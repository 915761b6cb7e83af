"""MaxBoxAcc and MaxBoxAccV2 of a dataset, from the hits of its samples.

Shape suffixes: N samples, I the four of maxbox.IOUS, S bytes of packed bits, L levels, D draws.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization.levels import LEVELS
from saltern.pipeline.metrics.localization.maxbox import BYTES, IOUS

_TOGETHER = 1024  # samples that are unpacked together
_TAIL = 2.5  # percent on each side of a 95 % interval
THRESHOLDS = np.arange(0, 1, 0.001)  # clovaai's list


@dataclass(frozen=True)
class Best:
    """An accuracy at its best threshold, which is an oracle's choice: no other split picked it."""

    value: float  # in [0, 1]
    low: float  # of the 95 % interval
    high: float
    thresholds: tuple[float, ...]  # one for each IoU, the smallest of equally good ones; in [0, 1) of the map's range


class BoxAccuracies:
    """The share of hits at each level, and the same of bootstrap draws, without keeping the samples.

    Each draw weighs each sample by a Poisson number of mean 1, which is the bootstrap over samples if they are many
    (Chamandy et al. 2012). The best thresholds are chosen within each draw again. Samples in the same order give the
    same interval.
    """

    def __init__(self, draws: int = 1000, seed: int = 0):
        self.samples = 0
        self._random = np.random.default_rng(seed)
        self._hits_IL = np.zeros((len(IOUS), LEVELS))
        self._drawn_D, self._drawn_DIL = np.zeros(draws), np.zeros((draws, len(IOUS), LEVELS))

    def add(self, hits_NIS: NDArray[np.uint8]) -> None:
        """Add samples, as `box_hits` returns them; zeros for a sample without a map."""
        if hits_NIS.shape[1:] != (len(IOUS), BYTES):
            raise ValueError(f"hits of shape {hits_NIS.shape} are not (N, {len(IOUS)}, {BYTES})")
        for start in range(0, len(hits_NIS), _TOGETHER):
            hit_NX = np.unpackbits(hits_NIS[start : start + _TOGETHER], axis=2, count=LEVELS).astype(np.float32)
            hit_NX = hit_NX.reshape(len(hit_NX), -1)
            weight_ND = self._random.poisson(1, (len(hit_NX), len(self._drawn_D))).astype(np.float32)
            self.samples += len(hit_NX)
            self._hits_IL += hit_NX.sum(0, np.float64).reshape(len(IOUS), LEVELS)
            self._drawn_D += weight_ND.sum(0, np.float64)
            self._drawn_DIL += (weight_ND.T @ hit_NX).reshape(-1, len(IOUS), LEVELS)

    def max_box_acc(self) -> Best:
        """Return MaxBoxAcc: the largest box, IoU >= 0.5."""
        return self._best(slice(0, 1))

    def max_box_acc_v2(self) -> Best:
        """Return MaxBoxAccV2: all boxes, the mean over IoU >= 0.3, 0.5 and 0.7, each at its own best threshold."""
        return self._best(slice(1, 4))

    def _best(self, which: slice) -> Best:
        share_IL = self._hits_IL[which] / max(self.samples, 1)
        drawn_D = self._drawn_DIL[:, which].max(2).mean(1) / np.maximum(self._drawn_D, 1)
        low, high = np.percentile(drawn_D, [_TAIL, 100 - _TAIL]).tolist()
        return Best(share_IL.max(1).mean(), low, high, tuple(threshold_of(int(level)) for level in share_IL.argmax(1)))


def levels_of(thresholds: Iterable[float]) -> list[int]:
    """Return the level at which clovaai cuts an 8-bit map of maximum 255, for each threshold."""
    return [int(threshold * 255) for threshold in thresholds]


def threshold_of(level: int) -> float:
    """Return the smallest of the 1,000 thresholds that cut at a level."""
    return float(THRESHOLDS[levels_of(THRESHOLDS).index(level)])
