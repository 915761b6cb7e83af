"""The hyperparameters of a localizer's training."""

import math
from dataclasses import dataclass

from saltern.schemas.choices import LabelKind, TrainingPrecision, TrunkKind, check_choice
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters: with the run and the trunk, they determine the result. Raises UserError on a bad value."""

    labels: str = "masks"  # what the mask learns: maps | masks | boxes
    trunk: str = "frozen"  # frozen | tuned
    smoothing: float = 0.5  # how far labels are pulled towards their mean, in [0, 1)
    lr: float = 1e-3  # of the head; AdamW
    lr_trunk: float = 1e-4  # of a tuned trunk
    weight_decay: float = 1e-4
    precision: str = "fp32"  # fp32 | tf32 | bf16
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("--labels", self.labels, LabelKind)
        check_choice("--trunk", self.trunk, TrunkKind)
        check_choice("--precision", self.precision, TrainingPrecision)
        for name in ("lr", "lr_trunk", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more, and finite")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"--smoothing {self.smoothing}: it is a share of the labels, 0 or more and less than 1")


def rate(step: int, steps: int) -> float:
    """Return the factor on the learning rates at a step (from 0): half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
