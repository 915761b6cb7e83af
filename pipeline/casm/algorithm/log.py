"""What one iteration reports.

Shape suffixes: B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saltern.pipeline.casm.algorithm.losses import MaskTerms

_MEASURED = (
    "clean_loss",
    "masked_loss",
    "score_term",
    "shortfall",
    "variation",
    "mask_mean",
    "square",
    "confused",
    "right",
)


def measure(clean_loss: Tensor, right_B: Tensor, masked_loss: Tensor, terms: MaskTerms, variation: Tensor) -> Tensor:
    """All that is measured, as means over the batch in one float64 tensor: ranks average it in one exchange."""
    area_B = terms.area_B.double()
    shares = [area_B, area_B.square(), terms.confused_B.double(), right_B.double()]
    losses = [clean_loss, masked_loss, terms.score, terms.shortfall, variation]
    return torch.stack([*(loss.detach().double() for loss in losses), *(share.detach().mean() for share in shares)])


@dataclass(frozen=True, eq=False)
class Log:
    """One iteration: its number, the slot of the past classifier that judged (-1: the current one), and its figures."""

    step: int
    member: int
    measured: Tensor  # of `measure`, over all ranks; on the device
    lam: Tensor  # lambda as it was used
    tv: float

    def area(self) -> Tensor:
        """The masks' mean, on the device."""
        return self.measured[_MEASURED.index("mask_mean")]

    def floats(self) -> dict[str, float]:
        """A line of the log; waits for the device.

        clean_loss: cross-entropy of f(x), before its step. masked_loss: that of f'(x * (1 - m)).
        score_term, size_term (-lambda * mean relu(q - mean(m))) and tv_term add up to mask_loss.
        mask_mean, mask_std: of the masks' areas over the batch. confused: share of images with q = 1.
        right: share of clean images that f knows.
        """
        *values, lam = torch.cat([self.measured, self.lam[None]]).tolist()
        found = dict(zip(_MEASURED, values, strict=True))
        size, variation = -lam * found["shortfall"], self.tv * found["variation"]
        # By the mean square, so that ranks need no second exchange.
        spread = max(found["square"] - found["mask_mean"] ** 2, 0.0) ** 0.5
        return {
            "step": self.step,
            "member": self.member,
            "clean_loss": found["clean_loss"],
            "masked_loss": found["masked_loss"],
            "mask_loss": found["score_term"] + size + variation,
            "score_term": found["score_term"],
            "size_term": size,
            "tv_term": variation,
            "mask_mean": found["mask_mean"],
            "mask_std": spread,
            "confused": found["confused"],
            "right": found["right"],
            "lambda": lam,
        }
