"""The hyperparameters of a training: with the classifier and the data, they determine its result."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from saltern.pipeline.casm.algorithm.thinning import THINNINGS, Thinning
from saltern.schemas import choices
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters, by default the published ones. Raises UserError if a value is out of range."""

    thinning: Thinning = THINNINGS["L100"]
    score: str = "entropy"
    lam: float | Literal["auto"] | None = None  # weight of the size penalty; None: the published one
    mask_area: float = 0.5  # mean mask, in (0, 1), that "auto" steers to
    pull: float = 0.0  # weight of (logit of the mean mask - logit of mask_area)^2, with lambda "auto"
    pool_size: int = 30
    pool_half: bool = False  # the pool's weights in 16 bits
    pool_draw: str = "shared"  # one pool member for all ranks, or one for each; the coin is always shared
    classifier_loss: str = "sequential"  # clean, then masked; "sum": half of each in one step (eq. 8)
    share_encoder: bool = True  # False: train a second trunk with the decoder; it starts as a copy of the classifier
    init_scale: float = 1.0  # factor on the last convolution's first weights; with 1, first masks are nearly binary
    tv: float = 0.0  # weight of the total variation of the masks
    batch_norm: str = "train"  # "eval": running statistics everywhere, so that the number of ranks has no effect
    precision: str = "fp32"
    lr_classifier: float = 1e-3  # SGD
    momentum: float = 0.9
    lr_mask: float = 1e-3  # Adam
    weight_decay: float = 1e-4
    clip: float = 10.0  # norm of the mask's gradient
    steps: int | None = None  # of the whole training: both rates x 0.1 after each third; None: constant rates
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            choices.check_choice(name, getattr(self, name), allowed)
        for name in ("pull", "init_scale", "tv", "lr_classifier", "momentum", "lr_mask", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be 0 or more, and finite")
        if not 0 < self.mask_area < 1:
            raise UserError(f"mask_area={self.mask_area} must lie between 0 and 1")
        if self.pool_size < 1 or not self.clip > 0:
            raise UserError(f"pool_size={self.pool_size} and clip={self.clip} must be more than 0")
        if self.lam not in (None, "auto") and not 0 <= self.start_lambda() < math.inf:
            raise UserError(f"lambda={self.lam} must be 0 or more and finite, or auto")

    def start_lambda(self) -> float:
        """Return lambda at the first step."""
        return self.thinning.lambda_for(self.score) if self.lam in (None, "auto") else float(self.lam)

    @property
    def pulling(self) -> float:
        """The weight of the pull; 0 if lambda is fixed, as only "auto" has a wanted area."""
        return self.pull if self.lam == "auto" else 0.0

    def rate(self, step: int) -> float:
        """Return the factor on both learning rates at a step (from 0)."""
        return 1.0 if self.steps is None else 0.1 ** (3 * min(step, self.steps - 1) // self.steps)


_CHOICES = {
    "score": choices.Score,
    "pool_draw": choices.PoolDraw,
    "classifier_loss": choices.ClassifierLoss,
    "batch_norm": choices.BatchNorm,
    "precision": choices.TrainingPrecision,
}


# The published values were tuned for ResNet-50 on ImageNet. With others, or in small batches, most trainings collapse.
PRESETS: dict[str, dict[str, Any]] = {
    "steady": {
        "lam": "auto",
        "pull": 1.0,
        "init_scale": 0.01,
        "tv": 8.0,
        "batch_norm": "eval",
        "score": "classification",
        "lr_classifier": 2e-4,
        "lr_mask": 3e-4,
    },
    "published": {},  # the defaults of Hyperparameters
}
