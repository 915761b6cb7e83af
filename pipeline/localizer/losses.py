"""The loss of a localizer.

Shape suffixes: B batch, g the mask's grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saltern.pipeline.localizer.labels import Targets


def cross_entropy(logits_Bgg: Tensor, wanted: Targets) -> Tensor:
    """Return the mean over the images of the binary cross-entropy of their known cells, nats; 0 for one without any.

    Args:
        logits_Bgg: of the mask.
    """
    each_Bgg = F.binary_cross_entropy_with_logits(logits_Bgg, wanted.mask_Bgg, reduction="none") * wanted.known_Bgg
    mask_B = each_Bgg.sum((1, 2)) / wanted.known_Bgg.sum((1, 2)).clamp_min(1)
    return mask_B.mean()


def smoothed(wanted: Targets, sums_2gg: Tensor, share: float) -> Targets:
    """Return the labels pulled towards their mean, cell by cell: (1 - share) * label + share * mean.

    The mean says where objects usually are. With it, a mask keeps to that where its image's labels are uncertain.

    Args:
        sums_2gg: of `mask_sums`, over all ranks.
    """
    mean_gg = sums_2gg[0] / sums_2gg[1].clamp_min(1e-6)
    return wanted._replace(mask_Bgg=wanted.mask_Bgg.lerp(mean_gg.expand_as(wanted.mask_Bgg), share))


def mask_sums(wanted: Targets) -> Tensor:
    """Return the sums over the batch of the known cells' labels, and their numbers: sums_2gg."""
    return torch.stack([(wanted.mask_Bgg * wanted.known_Bgg).sum(0), wanted.known_Bgg.sum(0)])
