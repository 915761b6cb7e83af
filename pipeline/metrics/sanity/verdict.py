"""Sum up cascades over images: means with their intervals, one number, and a verdict by a fixed rule.

Shape suffixes: S stages, N images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.metrics.sanity.cascade import Cascade

_Z = 1.96  # standard deviations that hold 95 % of a normal distribution
HALF = 0.5
RULE = (
    "area = mean over the cascade of the rank correlation of absolute maps, from 1 at the trained model; the method "
    "passes if the 95 % interval of the area lies below 0.5, fails if it lies above, and is undecided between"
)
PASSES, FAILS, UNDECIDED = "passes", "fails", "undecided"
COLUMNS = {"spearman": "spearman_B", "absolute": "absolute_B", "ssim": "ssim_B", "entropy": "entropy_B"}
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A mean over images and half its 95 % interval (normal approximation)."""

    value: float
    plus_minus: float

    @classmethod
    def of(cls, values_N: Numbers) -> "Figure":
        """Return the figure of values; NaN without values, and no interval of a single one."""
        count = len(values_N)
        if not count:
            return cls(math.nan, math.nan)
        spread = float(values_N.std(ddof=1)) if count > 1 else math.nan
        return cls(float(values_N.mean()), _Z * spread / math.sqrt(count))

    def to_json(self) -> dict[str, float | None]:
        """Return value and plus_minus; None for NaN."""
        return {name: None if math.isnan(one) else one for name, one in vars(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.plus_minus) else f" ± {self.plus_minus:.3f}")


@dataclass
class Curves:
    """The cascades of batches of images, joined."""

    layers: list[str] = field(default_factory=list)  # by stage: the last that was drawn again
    _parts: list[dict[str, Numbers]] = field(default_factory=list)  # (S, N) by column, and the first entropy (1, N)

    def add(self, found: Cascade) -> None:
        """Add the images of a batch."""
        self.layers = [stage.layer for stage in found.stages]
        columns = {**COLUMNS, "constant": "constant_B"}
        part = {
            name: np.stack([getattr(stage, column).double().cpu().numpy() for stage in found.stages])
            for name, column in columns.items()
        }
        self._parts.append({**part, "before": found.entropy_B.double().cpu().numpy()[None]})

    @property
    def images(self) -> int:
        return sum(part["before"].shape[1] for part in self._parts)

    def values(self, name: str) -> Numbers:
        """Return a column of all images: (S, N)."""
        return np.concatenate([part[name] for part in self._parts], 1)

    def stages(self, name: str) -> list[Figure]:
        """Return the figure of a column at each stage."""
        return [Figure.of(values_N) for values_N in self.values(name)]

    def area(self, name: str = "absolute") -> Figure:
        """Return the area under a correlation's curve over the share of the stages, from 1 at the trained model."""
        values_SN = self.values(name)
        curve = np.concatenate([np.ones((1, values_SN.shape[1])), values_SN])
        return Figure.of(np.trapezoid(curve, dx=1 / len(values_SN), axis=0))

    def rise(self) -> Figure:
        """Return the relative rise of the entropy at full randomisation, over images whose map had any."""
        before_N, after_N = self.values("before")[0], self.values("entropy")[-1]
        some = before_N > 0
        return Figure.of(after_N[some] / before_N[some] - 1)

    def verdict(self) -> str:
        """Return the verdict by RULE; a cascade of one stage has none."""
        area = self.area()
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
                "constant": int(self.values("constant")[number].sum()),
            }
            for number, layer in enumerate(self.layers)
        ]
        return {
            "images": self.images,
            "verdict": self.verdict(),
            "rule": RULE,
            "area": self.area().to_json(),
            "area_signed": self.area("spearman").to_json(),
            "full_randomisation": {name: figures[-1].to_json() for name, figures in columns.items()},
            "entropy": Figure.of(self.values("before")[0]).to_json(),
            "entropy_rise": self.rise().to_json(),
            "stages": stages,
        }


def lines(curves: Curves) -> Sequence[str]:
    """Return the figures as lines of text."""
    last = {name: curves.stages(name)[-1] for name in COLUMNS}
    constant = int(curves.values("constant")[-1].sum())
    return [
        f"{curves.verdict()}: area under the rank correlation of absolute maps {curves.area()} (0.5 divides)",
        f"all layers random: rank correlation {last['spearman']}, of absolute maps {last['absolute']}, SSIM "
        f"{last['ssim']}",
        f"entropy {Figure.of(curves.values('before')[0])} bits before, {last['entropy']} after, relative rise "
        f"{curves.rise()}",
        *(
            [f"{constant} of {curves.images} maps of the random model are constant, and count as correlation 0"]
            * (constant > 0)
        ),
    ]
