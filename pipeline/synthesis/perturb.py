"""Targeted PGD in pixel space: plain, or confined to the pixels where a map is high.

Shape suffixes: B batch, C H W the network's input, K classes. Images are in [0, 1], perturbations in the same unit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.schemas.config import PGD

Logits = Callable[[Tensor], Tensor]  # image_BCHW in [0, 1] -> logits_BK
Remap = Callable[[Tensor], Tensor]  # image_BCHW in [0, 1] -> map_BHW in [0, 1]


def perturb(
    logits_of: Logits, image_BCHW: Tensor, target_B: Tensor, how: PGD, map_BHW: Tensor, remap: Remap | None = None
) -> Tensor:
    """Descend CE(f(I + p), target) + beta * ||p * (1 - map)||_2 by projected gradient steps (Madry 2018).

    Jalwana 2021 gives beta = 50 but no unit of the norm. With the root of the sum (l2), the penalty outweighs the
    cross-entropy and hardly any image fools the model; the root of the mean (rms) gives the published results.
    After each step p is clamped to |p| <= epsilon and I + p to [0, 1]. The loss is summed over the batch and each
    sample has its own norm, so samples do not mix. The norm's gradient at p = 0 is taken as zero. The iterate with the
    least objective is returned, as steps of a fixed length circle around the minimum.

    Args:
        logits_of: of a frozen model.
        image_BCHW: in [0, 1], multiples of 1/255.
        target_B: int64, the class that the model should see.
        how: the settings.
        map_BHW: in [0, 1], high where the perturbation is allowed.
        remap: makes the map of a perturbed image; needed if `how.recompute` is not 0.

    Returns:
        p_BCHW: rounded to multiples of 1/255 within epsilon, so that an 8-bit image file can hold I + p.
    """
    p_BCHW = best_BCHW = torch.zeros_like(image_BCHW)
    least_B = image_BCHW.new_full(target_B.shape, torch.inf, dtype=torch.float32)
    beta = how.beta / p_BCHW[0].numel() ** 0.5 if how.norm == "rms" else how.beta
    for step in range(how.steps + 1):
        if remap is not None and how.recompute and step and step % how.recompute == 0:
            map_BHW = remap(image_BCHW + p_BCHW)
        weight_B1HW = 1 - map_BHW[:, None]
        loss_B, slope_BCHW = _fooling(logits_of, image_BCHW, p_BCHW, target_B)
        if beta:
            norm_B, norm_slope_BCHW = weighed_norm(p_BCHW, weight_B1HW)
            loss_B, slope_BCHW = loss_B + beta * norm_B, slope_BCHW + beta * norm_slope_BCHW
        best_BCHW = torch.where((loss_B < least_B)[:, None, None, None], p_BCHW, best_BCHW)
        least_B = torch.minimum(least_B, loss_B.float())
        p_BCHW = (p_BCHW - how.step_size * _step(slope_BCHW, how.rule)).clamp(-how.epsilon, how.epsilon)
        p_BCHW = (image_BCHW + p_BCHW).clamp(0, 1) - image_BCHW
    most = int(how.epsilon * 255 + 1e-3)
    return (best_BCHW * 255).round().clamp(-most, most) / 255


def _fooling(logits_of: Logits, image_BCHW: Tensor, p_BCHW: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each sample and its gradient in p."""
    p_BCHW = p_BCHW.detach().requires_grad_()
    loss_B = F.cross_entropy(logits_of(image_BCHW + p_BCHW).float(), target_B, reduction="none")
    (slope_BCHW,) = torch.autograd.grad(loss_B.sum(), p_BCHW)
    return loss_B.detach(), slope_BCHW


def _step(slope_BCHW: Tensor, rule: str) -> Tensor:
    if rule == "sign":
        return slope_BCHW.sign()
    rms_B111: Tensor = slope_BCHW.square().mean((1, 2, 3), keepdim=True).sqrt()
    step_BCHW: Tensor = slope_BCHW / rms_B111.where(rms_B111 > 0, torch.ones_like(rms_B111))
    return step_BCHW


def weighed_norm(p_BCHW: Tensor, weight_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Return ||p * weight||_2 of each sample and its gradient in p, zeros if the norm is zero."""
    norm_B = (p_BCHW * weight_B1HW).flatten(1).norm(dim=1)
    divisor_B111 = norm_B.where(norm_B > 0, torch.ones_like(norm_B))[:, None, None, None]
    return norm_B, p_BCHW * weight_B1HW**2 / divisor_B111


def unit(map_BHW: Tensor) -> Tensor:
    """Scale each map to [0, 1]: negative values become 0 and the largest value 1; zeros stay zeros."""
    map_BHW = map_BHW.clamp_min(0)
    top_B11 = map_BHW.amax((1, 2), keepdim=True)
    return map_BHW / top_B11.where(top_B11 > 0, torch.ones_like(top_B11))
