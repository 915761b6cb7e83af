"""The loss of a localizer.

Shape suffixes: B batch, g the mask's grid.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from saltern.pipeline.localizer.labels import Targets
from saltern.pipeline.masknet.network import total_variation


class Terms(NamedTuple):
    """The terms of the loss: float32 scalars with gradients."""

    mask: Tensor  # binary cross-entropy of known cells, nats
    variation: Tensor  # total variation of the masks


def localizer_terms(logits_Bgg: Tensor, wanted: Targets) -> Terms:
    """Return the terms, each a mean over the images; the cross-entropy of an image without a known cell is 0.

    Args:
        logits_Bgg: of the mask.
    """
    each_Bgg = F.binary_cross_entropy_with_logits(logits_Bgg, wanted.mask_Bgg, reduction="none") * wanted.known_Bgg
    mask_B = each_Bgg.sum((1, 2)) / wanted.known_Bgg.sum((1, 2)).clamp_min(1)
    return Terms(mask_B.mean(), total_variation(logits_Bgg.sigmoid()[:, None]))
