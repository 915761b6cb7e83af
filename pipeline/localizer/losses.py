"""The losses of a localizer.

Shape suffixes: B batch, g the mask's grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saltern.pipeline.localizer.labels import Targets


class Terms(NamedTuple):
    """The terms of the loss: float32 scalars with gradients."""

    mask: Tensor  # binary cross-entropy of known cells, nats
    l1: Tensor  # mean absolute difference of the boxes' edges, in shares of the side
    giou: Tensor  # mean of 1 - GIoU, in [0, 2]


def localizer_terms(logits_Bgg: Tensor, box_B4: Tensor, wanted: Targets) -> Terms:
    """Return the terms, each a mean over the images: of those without a known cell or box, it is 0.

    Args:
        logits_Bgg: of the mask.
        box_B4: x0, y0, x1, y1 as shares of the side.
    """
    each_Bgg = F.binary_cross_entropy_with_logits(logits_Bgg, wanted.mask_Bgg, reduction="none") * wanted.known_Bgg
    mask_B = each_Bgg.sum((1, 2)) / wanted.known_Bgg.sum((1, 2)).clamp_min(1)
    l1_B = (box_B4 - wanted.box_B4).abs().mean(1) * wanted.has_box_B
    giou_B = (1 - giou(box_B4, wanted.box_B4)) * wanted.has_box_B
    return Terms(mask_B.mean(), l1_B.mean(), giou_B.mean())


def giou(one_B4: Tensor, other_B4: Tensor) -> Tensor:
    """Return the generalised IoU of pairs of boxes, in (-1, 1] (Rezatofighi 2019, algorithm 1).

    GIoU = IoU - |hull without the union| / |hull|; two boxes without an area have GIoU 0 with each other.
    """
    low_B2, high_B2 = torch.maximum(one_B4[:, :2], other_B4[:, :2]), torch.minimum(one_B4[:, 2:], other_B4[:, 2:])
    shared_B = (high_B2 - low_B2).clamp_min(0).prod(1)
    union_B = _area(one_B4) + _area(other_B4) - shared_B
    first_B2, last_B2 = torch.minimum(one_B4[:, :2], other_B4[:, :2]), torch.maximum(one_B4[:, 2:], other_B4[:, 2:])
    hull_B = (last_B2 - first_B2).prod(1)
    least = torch.finfo(one_B4.dtype).tiny
    return shared_B / union_B.clamp_min(least) - (hull_B - union_B) / hull_B.clamp_min(least)


def _area(box_B4: Tensor) -> Tensor:
    return (box_B4[:, 2:] - box_B4[:, :2]).prod(1)
