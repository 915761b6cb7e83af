"""The measurements of one iteration.

Shape suffixes: B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saltern.pipeline.casm.algorithm.losses import MaskTerms

# Means over the batch, in the order of `measure`.
MEASURED = (
    "clean_loss",
    "masked_loss",
    "score_term",
    "shortfall",
    "variation",
    "pull",
    "mask_mean",
    "square",
    "confused",
    "right",
)


def measure(
    clean_loss: Tensor, right_B: Tensor, masked_loss: Tensor, terms: MaskTerms, variation: Tensor, pull: Tensor
) -> Tensor:
    """Return MEASURED as one float64 tensor, so that ranks average it in one exchange."""
    area_B = terms.area_B.double()
    shares = [area_B, area_B.square(), terms.confused_B.double(), right_B.double()]
    losses = [clean_loss, masked_loss, terms.score, terms.shortfall, variation, pull]
    return torch.stack([*(loss.detach().double() for loss in losses), *(share.detach().mean() for share in shares)])


@dataclass(frozen=True, eq=False)
class Log:
    """One iteration: its number, the pool slot of its classifier (-1: the current classifier), and its measurements."""

    step: int
    member: int
    measured: Tensor  # MEASURED over all ranks, on the device
    lam: Tensor  # lambda of this iteration
    tv: float  # weight of `variation`
    pull: float  # weight of `pull`

    def area(self) -> Tensor:
        """Return the mean mask, on the device."""
        return self.measured[MEASURED.index("mask_mean")]

    def floats(self) -> dict[str, float]:
        """Return the iteration as one line of the log. Waits for the device.

        clean_loss: cross-entropy of f(x), before its step. masked_loss: that of f'(x * (1 - m)).
        score_term, size_term (-lambda * mean relu(q - mean(m))), tv_term and pull_term add up to mask_loss.
        mask_mean, mask_std: of the masks' areas over the batch. confused: share of images with q = 1.
        right: share of clean images whose class f predicts.
        """
        *values, lam = torch.cat([self.measured, self.lam[None]]).tolist()
        measured = dict(zip(MEASURED, values, strict=True))
        size, variation = -lam * measured["shortfall"], self.tv * measured["variation"]
        pull = self.pull * measured["pull"]
        # From the mean square, so that ranks need no second exchange.
        spread = max(measured["square"] - measured["mask_mean"] ** 2, 0.0) ** 0.5
        return {
            "step": self.step,
            "member": self.member,
            "clean_loss": measured["clean_loss"],
            "masked_loss": measured["masked_loss"],
            "mask_loss": measured["score_term"] + size + variation + pull,
            "score_term": measured["score_term"],
            "size_term": size,
            "tv_term": variation,
            "pull_term": pull,
            "mask_mean": measured["mask_mean"],
            "mask_std": spread,
            "confused": measured["confused"],
            "right": measured["right"],
            "lambda": lam,
        }
