"""Sum up cascades over images: means with their intervals, one number, and a verdict by a fixed rule.

Shape suffixes: S stages, N images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.96  # standard deviations that hold 95 % of a normal distribution
HALF = 0.5
RULE = (
    "area = mean over the cascade of the rank correlation of absolute maps, from 1 at the trained model; the method "
    "passes if the 95 % interval of the area lies below 0.5, fails if it lies above, and is undecided between"
)
PASSES, FAILS, UNDECIDED = "passes", "fails", "undecided"
COLUMNS = ("spearman", "absolute", "ssim", "entropy")  # with a value for each stage
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A mean over images and half its 95 % interval (normal approximation)."""

    value: float
    plus_minus: float

    @classmethod
    def of(cls, values_N: Numbers) -> "Figure":
        """Return the figure of values; NaN without values, and no interval of a single one."""
        moments = Moments()
        moments.add(values_N[None])
        return moments.figures()[0]

    def to_json(self) -> dict[str, float | None]:
        """Return value and plus_minus; None for NaN."""
        return {name: None if math.isnan(one) else one for name, one in vars(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.plus_minus) else f" ± {self.plus_minus:.3f}")


class Moments:
    """Means and squared deviations of rows of values, which come in parts (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean_S: Numbers = np.zeros(1)
        self._squares_S: Numbers = np.zeros(1)

    def add(self, values_SN: Numbers) -> None:
        """Add values of further images."""
        count = values_SN.shape[1]
        if not count:
            return
        mean_S, total = values_SN.mean(1), self._count + count
        apart_S = mean_S - self._mean_S
        within_S = ((values_SN - mean_S[:, None]) ** 2).sum(1)
        self._mean_S = self._mean_S + apart_S * (count / total)
        self._squares_S = self._squares_S + within_S + apart_S**2 * (self._count * count / total)
        self._count = total

    def figures(self) -> list[Figure]:
        """Return the figure of each row; NaN without values."""
        if not self._count:
            return [Figure(math.nan, math.nan)]
        spread_S = np.sqrt(self._squares_S / (self._count - 1)) if self._count > 1 else self._squares_S + math.nan
        around_S = _Z * spread_S / math.sqrt(self._count)
        return [Figure(*pair) for pair in zip(self._mean_S.tolist(), around_S.tolist(), strict=True)]


class Curves:
    """Sums over the cascades of images. Memory does not grow with their number."""

    def __init__(self) -> None:
        self.layers: list[str] = []  # by stage: the last that is random
        self.images = 0
        self.signed = False  # whether the correlations of maps and of absolute maps differ
        self.constant_S: NDArray[np.int64] = np.zeros(1, np.int64)  # maps with one value everywhere
        self._moments = {name: Moments() for name in (*COLUMNS, "before", "area", "area_signed", "rise")}

    def add(self, layers: list[str], columns: Mapping[str, NDArray[Any]]) -> None:
        """Add images.

        Args:
            layers: by stage, the last that is random.
            columns: `constant` and those of COLUMNS, (S, N); `before`, (N), the entropy of the trained model's maps.
        """
        before_N, entropy_SN = columns["before"], columns["entropy"]
        some_N = before_N > 0
        values = {name: columns[name] for name in COLUMNS} | {
            "before": before_N[None],
            "area": _area(columns["absolute"])[None],
            "area_signed": _area(columns["spearman"])[None],
            "rise": (entropy_SN[-1, some_N] / before_N[some_N] - 1)[None],
        }
        for name, values_SN in values.items():
            self._moments[name].add(values_SN.astype(np.float64))
        self.layers = layers
        self.images += len(before_N)
        self.signed = self.signed or not np.array_equal(columns["spearman"], columns["absolute"])
        self.constant_S = self.constant_S + columns["constant"].sum(1)

    def stages(self, name: str) -> list[Figure]:
        """Return the figure of a column at each stage."""
        return self._moments[name].figures()

    def figure(self, name: str) -> Figure:
        """Return a figure of all stages.

        Args:
            name: area, area_signed (under a correlation's curve over the share of the stages, from 1 at the trained
                model), before (entropy of its maps), or rise (relative, of the entropy at full randomisation, over
                images whose map had any).
        """
        return self._moments[name].figures()[0]

    def verdict(self) -> str:
        """Return the verdict by RULE; a cascade of one stage has none."""
        area = self.figure("area")
        if len(self.layers) < 2 or math.isnan(area.plus_minus):
            return UNDECIDED
        if area.value + area.plus_minus < HALF:
            return PASSES
        return FAILS if area.value - area.plus_minus > HALF else UNDECIDED

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON."""
        columns = {name: self.stages(name) for name in COLUMNS}
        stages = [
            {
                "layer": layer,
                **{name: figures[number].to_json() for name, figures in columns.items()},
                "constant": int(self.constant_S[number]),
            }
            for number, layer in enumerate(self.layers)
        ]
        return {
            "images": self.images,
            "verdict": self.verdict(),
            "rule": RULE,
            "area": self.figure("area").to_json(),
            "area_signed": self.figure("area_signed").to_json(),
            "full_randomisation": {name: figures[-1].to_json() for name, figures in columns.items()},
            "entropy": self.figure("before").to_json(),
            "entropy_rise": self.figure("rise").to_json(),
            "stages": stages,
        }


def _area(values_SN: NDArray[Any]) -> Numbers:
    """Return the area under each image's curve, from 1 at the trained model, over the share of the stages."""
    curve = np.concatenate([np.ones((1, values_SN.shape[1])), values_SN])
    area_N: Numbers = np.trapezoid(curve, dx=1 / len(values_SN), axis=0)
    return area_N


def lines(curves: Curves) -> Sequence[str]:
    """Return the figures as lines of text."""
    last = {name: curves.stages(name)[-1] for name in COLUMNS}
    constant = int(curves.constant_S[-1])
    return [
        f"{curves.verdict()}: area under the rank correlation of absolute maps {curves.figure('area')} (0.5 divides)",
        f"all layers random: rank correlation {last['spearman']}, of absolute maps {last['absolute']}, SSIM "
        f"{last['ssim']}",
        f"entropy {curves.figure('before')} bits before, {last['entropy']} after, relative rise "
        f"{curves.figure('rise')}",
        *(
            [f"{constant} of {curves.images} maps of the random model are constant, and count as correlation 0"]
            * (constant > 0)
        ),
    ]
