"""Lambda, the weight of the size penalty: fixed, or steered so that masks cover a given share of the image.

    mean       += 0.2 * (area - mean)                      running mean of the masks' area
    integral   += 0.02 * (mean - target)
    log lambda  = log lambda_0 + integral + 2 * (mean - target)

A larger lambda makes masks smaller. Under Adam, their area moves at a bounded speed as long as lambda is wrong. An
integral term without a proportional one reacts too late and oscillates forever; the proportional term damps it.
"""

import math

import torch
from torch import Tensor

BLEND = 0.2  # of the running mean, which covers about 5 steps
PROPORTIONAL = 2.0  # an error of 0.1 in the area moves lambda by 22 %
INTEGRAL = 0.02  # an error of 0.1 in the area moves lambda by a factor of e in 500 steps
REACH = math.log(1000)  # limit of the integral, so that it recovers soon from a collapse


class Lambda:
    """The weight of the size penalty, a float64 scalar that stays on the device.

    Args:
        start: at the first step.
        area: mean mask to steer to, in (0, 1); None: lambda is fixed.
    """

    def __init__(self, start: float, area: float | None, device: torch.device) -> None:
        self._start, self._area = start, area
        initial = [start, 0.0, area or 0.0]
        self.value, self._integral, self._mean = (torch.tensor(v, dtype=torch.float64, device=device) for v in initial)

    def observe(self, area: Tensor) -> None:
        """Update lambda after a step whose masks had this mean over all ranks."""
        if self._area is None:
            return
        self._mean = self._mean + BLEND * (area.double() - self._mean)
        error = self._mean - self._area
        self._integral = (self._integral + INTEGRAL * error).clamp(-REACH, REACH)
        self.value = self._start * (self._integral + PROPORTIONAL * error).exp()

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "integral": self._integral, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value, self._integral, self._mean = (
            state[key].to(self.value.device) for key in ("value", "integral", "mean")
        )
