"""Remove pixels by their rank, fill the gaps by noisy linear imputation, and compare the probabilities (ROAD).

Rong 2022 (2202.00449); the combination of both orders is pytorch-grad-cam's ROADCombined.

Shape suffixes: B batch, C H W the network's input, P percentiles, R images of one pass, O orders, N values.
"""

# ruff: noqa: N815  (fields carry a shape suffix)

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saltern.pipeline.methods.gradients.noise import gaussian
from saltern.pipeline.metrics.faithfulness.curves import ranks
from saltern.pipeline.metrics.faithfulness.imputation import impute
from saltern.pipeline.metrics.faithfulness.passes import BATCH, Logits, probability, shared_passes, target_probability

PERCENTILES = (20, 40, 60, 80)  # a percentile p removes 100 - p percent of the pixels
NOISE = 0.01  # standard deviation, in units of the normalised input, as published


class Road(NamedTuple):
    """Change of the probability of the target, mean over the percentiles. All float32."""

    combined_B: Tensor  # (lerf - morf) / 2, in [-0.5, 0.5]; more is better
    morf_B: Tensor  # most relevant pixels removed first; less is better
    lerf_B: Tensor  # least relevant pixels removed first; more is better


@torch.no_grad()
def road(
    logits: Logits,
    x_BCHW: Tensor,
    map_BHW: Tensor,
    target_B: Tensor,
    seed_B: Tensor,
    *,
    percentiles: Sequence[int] = PERCENTILES,
    noise: float = NOISE,
    batch: int = BATCH,
    whole_B: Tensor | None = None,
) -> Road:
    """Measure remove-and-debias. A pass of images for each percentile and order: 8 of the batch's size by default.

    A percentile p keeps the ceil(p / 100 * (N - 1)) pixels below it, as numpy's linear percentile does for N distinct
    values. In both orders equal values go in the order of their index, so that a constant map has a combination of 0
    but for the noise; pytorch-grad-cam removes all pixels that equal the threshold.

    Args:
        logits: of the network, normalised images to logits_BK.
        x_BCHW: normalised images.
        map_BHW: at the images' resolution; only the order of its values counts.
        target_B: int64, the classes.
        seed_B: int64, seeds of each sample's noise: results do not depend on the batch.
        percentiles: between 0 and 100.
        noise: standard deviation, in units of the normalised input.
        batch: images that are imputed and passed at once at most.
        whole_B: probability of the targets on x_BCHW, if known: saves its pass.
    """
    if whole_B is None:
        whole_B = target_probability(logits, x_BCHW, target_B, batch=batch)
    rank_OBHW = torch.stack([ranks(map_BHW), ranks(-map_BHW)]).view(2, *map_BHW.shape)
    removed_P = _removed(map_BHW[0].numel(), percentiles).to(map_BHW.device)
    parts = []
    for version_R, sample_R in shared_passes(2 * len(removed_P), len(target_B), batch, map_BHW.device):
        order_R, percentile_R = version_R // len(removed_P), version_R % len(removed_P)
        removed_RHW = rank_OBHW[order_R, sample_R] < removed_P[percentile_R][:, None, None]
        x_RCHW = impute(x_BCHW[sample_R], removed_RHW)
        noise_RN = gaussian(seed_B[sample_R] + (version_R << 32), range(1), x_RCHW[0].numel())[0]
        x_RCHW = x_RCHW + noise * noise_RN.view(x_RCHW.shape) * removed_RHW[:, None]
        parts.append(probability(logits(x_RCHW), target_B[sample_R]))
    morf_B, lerf_B = torch.cat(parts).view(2, len(removed_P), -1).mean(1) - whole_B
    return Road((lerf_B - morf_B) / 2, morf_B, lerf_B)


def _removed(pixels: int, percentiles: Sequence[int]) -> Tensor:
    return torch.tensor([pixels - math.ceil(percentile * (pixels - 1) / 100) for percentile in percentiles])
