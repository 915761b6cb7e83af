"""Sums over samples, and the same sums of bootstrap draws, without keeping the samples.

Shape suffixes: N samples, D draws, X numbers of a sample.
"""

import math

import numpy as np
from numpy.typing import NDArray

_TOGETHER = 1024  # samples that are weighed together
_TAILS = (2.5, 97.5)  # percent below the ends of a 95 % interval

# A Poisson number of mean 1 for each 16-bit random number: drawing from this table takes a quarter of numpy's time.
_POISSON = np.searchsorted(
    np.cumsum([2**16 * math.exp(-1) / math.factorial(count) for count in range(8)]), np.arange(2**16), "right"
).astype(np.float32)


class DrawnSums:
    """Sums of the samples' numbers: of all samples, and of each draw.

    Each draw weighs each sample by a Poisson number of mean 1, which is the bootstrap over samples if they are many
    (Chamandy et al., "Estimating uncertainty for massive data streams", 2012). Samples in the same order give the same
    sums, in portions of any size.
    """

    def __init__(self, shape: tuple[int, ...], draws: int = 1000, seed: int = 0):
        self.samples = 0
        self.sums = np.zeros(shape)
        self.drawn_samples_D = np.zeros(draws)
        self.drawn_sums = np.zeros((draws, *shape))  # the first axis is D
        self._random = np.random.default_rng(seed)

    def add(self, numbers: NDArray[np.generic]) -> None:
        """Add samples; the first axis is N."""
        for start in range(0, len(numbers), _TOGETHER):
            part_NX = numbers[start : start + _TOGETHER].astype(np.float32)
            part_NX = part_NX.reshape(len(part_NX), self.sums.size)
            weight_DN = _POISSON[self._random.integers(0, 2**16, (len(part_NX), len(self.drawn_sums)), np.uint16)].T
            self.samples += len(part_NX)
            self.sums += part_NX.sum(0, np.float64).reshape(self.sums.shape)
            self.drawn_samples_D += weight_DN.sum(1, np.float64)
            self.drawn_sums += (weight_DN @ part_NX).reshape(self.drawn_sums.shape)


def interval(drawn_D: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a statistic's draws (percentiles); NaN if no draw has it."""
    drawn_D = drawn_D[~np.isnan(drawn_D)]
    low, high = np.percentile(drawn_D, _TAILS).tolist() if len(drawn_D) else (np.nan, np.nan)
    return low, high
