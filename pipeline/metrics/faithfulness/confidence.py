"""Dim an image by its map, and compare the probabilities of the target.

Shape suffixes: B batch, C H W the network's input.
"""

# ruff: noqa: N815  (fields carry a shape suffix)

from typing import NamedTuple

import torch
from torch import Tensor

from saltern.pipeline.metrics.faithfulness.passes import BATCH, Logits, masked, target_probability, unit_maps


class Drop(NamedTuple):
    """Change of the probability p of the target when the image is multiplied by its map m, scaled to [0, 1]."""

    drop_B: Tensor  # max(0, p(x) - p(m x)) / p(x), float32 in [0, 1]; 0 if p(x) is 0
    increase_B: Tensor  # bool: p(m x) > p(x)


class Densities(NamedTuple):
    """Probability of the target in the marked and in the other part of the image, each over the mean of its weights."""

    positive_B: Tensor  # p(m x) / mean(m), float32; more is better; NaN for a map of zeros
    negative_B: Tensor  # p((1 - m) x) / mean(1 - m), float32; less is better; NaN for a map of ones


def average_drop(
    logits: Logits,
    x_BCHW: Tensor,
    map_BHW: Tensor,
    target_B: Tensor,
    black_C11: Tensor,
    *,
    batch: int = BATCH,
    whole_B: Tensor | None = None,
    marked_B: Tensor | None = None,
) -> Drop:
    """Measure average drop (less is better) and increase in confidence (more is better).

    Chattopadhay 2018 (Grad-CAM++, 1710.11063), section 4.1; Wang 2020 (Score-CAM, 1910.01279), section 4.2.

    Args:
        logits: of the network, normalised images to logits_BK.
        x_BCHW: normalised images.
        map_BHW: at the images' resolution, scaled by `passes.unit_maps`.
        target_B: int64, the classes.
        black_C11: of `passes.black_level`: whether pixels or normalised values are multiplied.
        batch: images of a pass at most.
        whole_B: probability of the targets on x_BCHW, if known: saves its pass.
        marked_B: `marked_probability` of the same arguments, if known: saves its pass.
    """
    if whole_B is None:
        whole_B = target_probability(logits, x_BCHW, target_B, batch=batch)
    if marked_B is None:
        marked_B = marked_probability(logits, x_BCHW, map_BHW, target_B, black_C11, batch=batch)
    divisor_B = whole_B.where(whole_B > 0, torch.ones_like(whole_B))  # float32 rounds tiny probabilities to 0
    return Drop((whole_B - marked_B).clamp_min(0) / divisor_B, marked_B > whole_B)


def densities(
    logits: Logits,
    x_BCHW: Tensor,
    map_BHW: Tensor,
    target_B: Tensor,
    black_C11: Tensor,
    *,
    batch: int = BATCH,
    marked_B: Tensor | None = None,
) -> Densities:
    """Measure positive and negative map density (Jalwana 2021, CAMERAS, 2106.10649). Arguments as `average_drop`."""
    weight_BHW = unit_maps(map_BHW)
    if marked_B is None:
        marked_B = marked_probability(logits, x_BCHW, map_BHW, target_B, black_C11, batch=batch)
    rest_B = target_probability(logits, masked(x_BCHW, 1 - weight_BHW, black_C11), target_B, batch=batch)
    mean_B, left_B = weight_BHW.mean((1, 2)), (1 - weight_BHW).mean((1, 2))
    return Densities(_over(marked_B, mean_B), _over(rest_B, left_B))


def marked_probability(
    logits: Logits, x_BCHW: Tensor, map_BHW: Tensor, target_B: Tensor, black_C11: Tensor, *, batch: int = BATCH
) -> Tensor:
    """Return probability_B of the targets on the images multiplied by their maps. Arguments as `average_drop`."""
    return target_probability(logits, masked(x_BCHW, unit_maps(map_BHW), black_C11), target_B, batch=batch)


def _over(probability_B: Tensor, mean_B: Tensor) -> Tensor:
    return torch.where(mean_B > 0, probability_B / mean_B, torch.nan)
