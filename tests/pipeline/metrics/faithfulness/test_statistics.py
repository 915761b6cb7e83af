"""Figures of maps equal loops over pixels, scikit-image's entropy and answers by hand."""

import pytest
import torch
from naive_faithfulness import batch, naive_unit
from skimage.measure import shannon_entropy

from saltern.pipeline.metrics.faithfulness.statistics import map_statistics, mask_share


def test_all_are_those_of_loops() -> None:
    _, map_BHW, _ = batch(4, side=9)
    map_BHW = map_BHW[:, :, :7]
    found = map_statistics(map_BHW)
    for at, map_HW in enumerate(map_BHW):
        unit_HW = naive_unit(map_HW)
        values = unit_HW.flatten().tolist()
        mean = sum(values) / 63
        variation = 0.0
        for y in range(9):
            for x in range(7):
                variation += abs(float(unit_HW[y, x] - unit_HW[y - 1, x])) if y else 0
                variation += abs(float(unit_HW[y, x] - unit_HW[y, x - 1])) if x else 0
        assert float(found.mean_B[at]) == pytest.approx(mean, rel=1e-5)
        assert float(found.std_B[at]) == pytest.approx((sum((v - mean) ** 2 for v in values) / 63) ** 0.5, rel=1e-5)
        assert float(found.total_variation_B[at]) == pytest.approx(variation / 63, rel=1e-5)
        levels = (unit_HW * 256).int().clamp_max(255).numpy()
        assert float(found.entropy_B[at]) == pytest.approx(shannon_entropy(levels, base=2), rel=1e-5)


def test_answers_by_hand() -> None:
    constant, stripes, ramp = torch.full((8, 32), 3.0), torch.zeros(8, 32), torch.arange(256.0).view(8, 32)
    stripes[:, ::2] = 5
    found = map_statistics(torch.stack([constant, stripes, ramp]))
    assert found.mean_B.tolist() == pytest.approx([1, 0.5, 0.5])
    assert found.std_B.tolist()[:2] == pytest.approx([0, 0.5])
    assert found.total_variation_B.tolist()[:2] == pytest.approx([0, 31 / 32])
    assert found.entropy_B.tolist() == pytest.approx([0, 1, 8])


def test_the_share_of_a_mask() -> None:
    mask_BHW = torch.tensor([[[True, False], [False, False]], [[True, True], [True, True]]])
    assert mask_share(mask_BHW).tolist() == [0.25, 1]
