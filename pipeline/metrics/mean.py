"""A mean, computed from sums."""

import math
from dataclasses import dataclass

_Z = 1.96  # standard deviations that hold 95 % of a normal distribution


@dataclass
class Mean:
    """A mean, computed from sums without keeping the values."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float | None) -> None:
        """Add a value; None is ignored."""
        if value is not None:
            self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    @property
    def value(self) -> float:
        """The mean; NaN without values."""
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """The mean squared deviation from the mean; NaN without values."""
        return max(self.squares / self.count - self.value * self.value, 0.0) if self.count else math.nan

    def percent(self) -> dict[str, float] | None:
        """Return the mean and half its 95 % interval (normal approximation), percent; None without values."""
        if not self.count:
            return None
        return {"value": 100 * self.value, "plus_minus": 100 * _Z * math.sqrt(self.variance / self.count)}
