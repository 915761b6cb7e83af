"""Class visualization: find the image with the largest logit of a class, by ascent from zeros or from noise.

Shape suffixes: B batch, C H W the network's input, K classes, T steps.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saltern.schemas.config import Ascent

Logits = Callable[[Tensor], Tensor]  # normalised I_BCHW -> logits_BK
_NOISE = 0.1  # standard deviation of the first image, normalised
_CLASSES = 1_000_003  # more than any model has, so that every (seed, class) has its own draw


@dataclass(frozen=True)
class Peak:
    """The result of an ascent."""

    image_BCHW: Tensor  # float32, normalised
    logit_B: Tensor  # of the class, on that image
    probability_B: Tensor
    objective_BT: Tensor  # before each step, and after the last: T = steps + 1

    def to_host(self) -> "Peak":
        return Peak(*(value.cpu() for value in vars(self).values()))


def start(target_B: Tensor, shape: tuple[int, int, int], init: str, seed: int) -> Tensor:
    """Return the first image of each class, normalised: zeros, or noise that depends only on seed and class."""
    if init == "zero":
        return torch.zeros(len(target_B), *shape)
    draws = [torch.Generator().manual_seed(seed * _CLASSES + target) for target in target_B.tolist()]
    return torch.stack([_NOISE * torch.randn(shape, generator=draw) for draw in draws])


def ascend(logits_of: Logits, image_BCHW: Tensor, target_B: Tensor, how: Ascent) -> Peak:
    """Ascend z_c(I) - lambda * ||I||_2^2 (Simonyan 2014, section 2) on the logit, by plain gradient steps.

    Args:
        logits_of: of a frozen model in which samples do not mix.
        image_BCHW: the first image, normalised. The norm is of the normalised image, as in the paper, so that zero is
            the mean image.
        target_B: int64, the class of each.
        how: the settings.
    """
    objectives = []
    for _ in range(how.steps):
        image_BCHW = image_BCHW.detach().requires_grad_()
        objective_B = _objective(logits_of(image_BCHW), image_BCHW, target_B, how.weight)
        slope_BCHW = torch.autograd.grad(objective_B.sum(), image_BCHW)[0]
        image_BCHW = image_BCHW + how.step_size * slope_BCHW
        objectives.append(objective_B.detach())
    with torch.no_grad():
        logits_BK = logits_of(image_BCHW).float()
        objectives.append(_objective(logits_BK, image_BCHW, target_B, how.weight))
    at = target_B[:, None]
    return Peak(
        image_BCHW.detach(),
        logits_BK.gather(1, at)[:, 0],
        logits_BK.softmax(1).gather(1, at)[:, 0],
        torch.stack(objectives, 1),
    )


def _objective(logits_BK: Tensor, image_BCHW: Tensor, target_B: Tensor, weight: float) -> Tensor:
    logit_B = logits_BK.float().gather(1, target_B[:, None])[:, 0]
    return logit_B - weight * image_BCHW.square().flatten(1).sum(1)
