"""The loss of the masks (Zolna 2020, eq. 3, 5 and 9; the published code if the two differ).

Shape suffixes: B batch, K classes, H W the network's input, h w the decoder's grid.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLAT = 80.0  # logit at which both sigmoids are normal numbers in float32


class MaskTerms(NamedTuple):
    """The terms of the mask loss: float32 scalars with gradients; and the values per image that they follow from."""

    score: Tensor  # minus the entropy, or minus the cross-entropy, of the masked image
    shortfall: Tensor  # mean of relu(q - mean(m)): how much of the image the masks of confused images keep
    area_B: Tensor  # mean(m_n), in [0, 1]
    confused_B: Tensor  # q_n, bool

    def loss(self, lam: Tensor | float) -> Tensor:
        """Return score - lambda * shortfall, to be minimised: a larger lambda makes smaller masks."""
        return self.score - lam * self.shortfall


def mask_terms(
    masked_logits_BK: Tensor, label_B: Tensor, right_B: Tensor, mask_B1HW: Tensor, score: str = "entropy"
) -> MaskTerms:
    """Return the terms of the mask loss.

        loss    = -lambda * mean_n relu(q_n - mean(m_n)) + score
        q_n     = f(x_n) is right and f'(x_n * (1 - m_n)) is wrong
        entropy:          score = -mean_n [ H(softmax f'(x_n * (1 - m_n))) * (f(x_n) is right) ], H in nats
        classification:   score = -mean_n CE(f'(x_n * (1 - m_n)), y_n)

    The size penalty acts only on masks that confuse a classifier that is right on the clean image.

    Args:
        masked_logits_BK: f' of the masked images.
        right_B: bool, whether the current classifier is right on the clean images.
        mask_B1HW: in [0, 1], 1 = masked out.
    """
    logits_BK = masked_logits_BK.float()
    # AND, not a sum: the sum of two bool tensors is a logical OR, which never equals 2.
    confused_B = right_B & (logits_BK.argmax(1) != label_B)
    area_B = mask_B1HW.float().mean((1, 2, 3))
    gain = (entropy(logits_BK) * right_B).mean() if score == "entropy" else F.cross_entropy(logits_BK, label_B)
    return MaskTerms(-gain, F.relu(confused_B.float() - area_B).mean(), area_B, confused_B)


def pull(mean: Tensor, shared_2: Tensor, area: float) -> Tensor:
    """Return offset^2, with the gradient 2 * offset * d mean(logits); offset = logit(mean mask) - logit(area).

    The published loss has no such term. There, once the sigmoid saturates, neither the score nor the size penalty has a
    gradient, and masks that left nothing or everything stay so. This term's gradient is that of the mean logit, so it
    reaches saturated logits too and grows with the distance. Its goal is the mean mask itself: if the mean logit had to
    be logit(area), wide logits would leave the mean mask 0.1 off.

    Args:
        mean: of the logits over the batch; takes the gradient.
        shared_2: `coverage` over all ranks. The average of the ranks' gradients is that of one process.
        area: wanted mean mask, in (0, 1).
    """
    offset = (shared_2[0] / shared_2[1]).log() - math.log(area / (1 - area))
    return offset.square() + 2 * offset * (mean - mean.detach())


def coverage(logits_B1hw: Tensor) -> Tensor:
    """Return the mean of sigmoid(logits) and of 1 - sigmoid(logits), float32 (2,), both above 0; without gradient."""
    bounded_B1hw = logits_B1hw.detach().float().clamp(-_FLAT, _FLAT)
    return torch.stack([bounded_B1hw.sigmoid().mean(), (-bounded_B1hw).sigmoid().mean()])


def entropy(logits_BK: Tensor) -> Tensor:
    """Return the Shannon entropy of softmax(logits), (B), in nats: 0..ln K."""
    log_p_BK = F.log_softmax(logits_BK.float(), 1)
    return -(log_p_BK.exp() * log_p_BK).sum(1)


def total_variation(mask_B1hw: Tensor) -> Tensor:
    """Return the mean squared difference of vertical neighbours plus that of horizontal ones.

    The published loss has no such term. Computed on the decoder's grid, as copies of one cell do not differ. 0 for a
    grid of one cell.
    """
    mask_B1hw = mask_B1hw.float()
    pairs = (mask_B1hw.diff(dim=2), mask_B1hw.diff(dim=3))
    return torch.stack([pair.square().sum() / max(pair.numel(), 1) for pair in pairs]).sum()
