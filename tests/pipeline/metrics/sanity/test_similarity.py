"""Rank correlation and structural similarity against SciPy and scikit-image, and the plain definitions."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from skimage.metrics import structural_similarity
from torch import Tensor

from saltern.pipeline.metrics.sanity.similarity import ranks, spearman, ssim


def maps(batch: int = 6, height: int = 23, width: int = 17, levels: int | None = None) -> Tensor:
    """Return random maps, with few levels if there are to be many equal values."""
    drawn = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(height + (levels or 0)))
    return drawn if levels is None else (drawn * levels).floor() / levels


@pytest.mark.parametrize("levels", [None, 5, 2])
def test_ranks_and_correlation_are_scipys(levels: int | None) -> None:
    a_BHW, b_BHW = maps(levels=levels), maps(levels=levels).flip(2) ** 2
    assert np.array_equal(ranks(a_BHW.flatten(1)), rankdata(a_BHW.flatten(1), axis=1))
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(a_BHW, b_BHW, strict=True)]
    assert spearman(a_BHW, b_BHW).numpy() == pytest.approx(expected, abs=1e-12)


def test_a_monotonous_change_keeps_the_ranks_and_a_constant_map_has_none() -> None:
    map_BHW = maps()
    assert spearman(map_BHW, map_BHW.exp() * 3 - 1).numpy() == pytest.approx(1)
    assert spearman(map_BHW, -map_BHW).numpy() == pytest.approx(-1)
    assert spearman(map_BHW, torch.full_like(map_BHW, 0.3)).tolist() == [0] * 6
    assert spearman(torch.zeros_like(map_BHW), torch.zeros_like(map_BHW)).tolist() == [0] * 6


@pytest.mark.parametrize("levels", [None, 4])
def test_structural_similarity_is_scikit_images(levels: int | None) -> None:
    a_BHW = maps(height=31, levels=levels).double()
    b_BHW = (a_BHW + 0.3 * maps(height=31).flip(1)).clamp(0, 1)
    expected = [structural_similarity(a, b, data_range=1) for a, b in zip(a_BHW.numpy(), b_BHW.numpy(), strict=True)]
    assert ssim(a_BHW, b_BHW).numpy() == pytest.approx(expected, abs=1e-10)
    assert ssim(a_BHW, a_BHW).numpy() == pytest.approx(1)
