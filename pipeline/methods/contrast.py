"""Finer targets: the classes that a class is compared with.

Shape suffixes: B batch, K classes, N similar classes, C features of the head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.masknet.head import linear_head
from saltern.pipeline.models.passes import Score
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Finer
from saltern.schemas.sizes import Side

_ROWS = 1024  # classes whose similarities are in memory at once


class Contrast:
    """The score z_c - alpha * mean of the logits of the classes most similar to c (Zhang 2025, Finer-CAM).

    The similarity of two classes is the cosine of their weights in the linear layer that gives the logits. If no single
    linear layer does, those of the nearest logits of the same image are the most similar.

    Args:
        model: in eval mode.
        finer: number of classes, and strength.
        side: of the images to come, pixels; None = as of `probe`.

    Raises:
        UserError: more classes to compare with than the model has.
    """

    def __init__(self, model: nn.Module, finer: Finer, side: Side | None) -> None:
        self._finer = finer
        found = linear_head(model, side)
        self.similar_KN = None  # int64, the most similar first; None: by the logits
        if found is not None:
            self._check(found[1].out_features)
            self.similar_KN = most_similar(found[1].weight.detach(), finer.count)

    def score(self, logits_BK: Tensor, class_B: Tensor) -> Score:
        """Return the scores of classes. The logits are those of the whole images, unmasked."""
        if self.similar_KN is not None:
            return Score(class_B, self.similar_KN[class_B], self._finer.alpha)
        self._check(logits_BK.shape[1])
        wide_BK = logits_BK.detach().to(torch.promote_types(logits_BK.dtype, torch.float32))
        distance_BK = (wide_BK - wide_BK.gather(1, class_B[:, None])).abs()
        distance_BK = distance_BK.scatter(1, class_B[:, None], torch.inf)
        nearest_BN = distance_BK.topk(self._finer.count, 1, largest=False).indices
        return Score(class_B, nearest_BN, self._finer.alpha)

    def _check(self, classes: int) -> None:
        if not 1 <= self._finer.count < classes:
            raise UserError(f"finer compares with {self._finer.count} classes; the model has {classes - 1} others")


def most_similar(weight_KC: Tensor, count: int) -> Tensor:
    """Return the `count` other rows of the largest cosine for each row, int64 (K, N), the most similar first."""
    unit_KC = F.normalize(weight_KC.float(), dim=1)
    found = []
    for start in range(0, len(unit_KC), _ROWS):
        cosine_RK = unit_KC[start : start + _ROWS] @ unit_KC.T
        cosine_RK.diagonal(start).fill_(-torch.inf)
        found.append(cosine_RK.topk(count, 1).indices)
    return torch.cat(found)
