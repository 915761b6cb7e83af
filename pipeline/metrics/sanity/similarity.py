"""Compare two maps of an image, for batches on the device.

Shape suffixes: B batch, H W the maps' grid, N values, G groups of equal values.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 7  # pixels, side of the window of SSIM, as scikit-image's default
_C1, _C2 = 0.01**2, 0.03**2  # for values in a range of 1


def spearman(a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
    """Return Spearman's rank correlation of each pair of maps, float64 (B), in [-1, 1].

    Equal values share the mean of their ranks. A constant map has no order: its correlation is 0.
    """
    a_BN, b_BN = (_centred(ranks(map_BHW.flatten(1))) for map_BHW in (a_BHW, b_BHW))
    norm_B = a_BN.norm(dim=1) * b_BN.norm(dim=1)
    return torch.where(norm_B > 0, (a_BN * b_BN).sum(1) / norm_B.clamp_min(1), 0)


def ranks(values_BN: Tensor) -> Tensor:
    """Return the rank of each value in its row, float64, from 1; equal values share the mean of their ranks."""
    sorted_BN, order_BN = values_BN.sort(1)
    new_BN = F.pad(sorted_BN[:, 1:] != sorted_BN[:, :-1], (1, 0), value=False)
    group_BN = new_BN.long().cumsum(1)
    count_BG = torch.zeros_like(group_BN).scatter_add_(1, group_BN, torch.ones_like(group_BN))
    mean_BG = count_BG.cumsum(1) - (count_BG.double() - 1) / 2
    return torch.empty_like(mean_BG).scatter_(1, order_BN, mean_BG.gather(1, group_BN))


def _centred(rank_BN: Tensor) -> Tensor:
    return rank_BN - (rank_BN.shape[1] + 1) / 2


def ssim(a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
    """Return the structural similarity of each pair of maps with values in [0, 1], float64 (B).

    As scikit-image's `structural_similarity` by its defaults with a data range of 1: a flat window of 7 x 7, sample
    covariances, the mean over all whole windows (Wang et al. 2004). Maps are at least 7 pixels high and wide.
    """
    a_B1HW, b_B1HW = a_BHW.double()[:, None], b_BHW.double()[:, None]

    def mean(map_B1HW: Tensor) -> Tensor:
        return F.avg_pool2d(map_B1HW, WINDOW, 1)

    sample = WINDOW**2 / (WINDOW**2 - 1)
    mean_a, mean_b = mean(a_B1HW), mean(b_B1HW)
    variances = sample * (mean(a_B1HW**2) - mean_a**2 + mean(b_B1HW**2) - mean_b**2)
    covariance = sample * (mean(a_B1HW * b_B1HW) - mean_a * mean_b)
    above = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    below = (mean_a**2 + mean_b**2 + _C1) * (variances + _C2)
    return (above / below).mean((1, 2, 3))
