"""Coherency, complexity and their harmonic means equal scipy's and loops, and answers by hand."""

import pytest
import torch
from naive_faithfulness import MEAN, STD, batch, naive_masked, naive_unit
from scipy.stats import pearsonr
from torch import Tensor

from saltern.pipeline.metrics.faithfulness.composite import adcc, arcc, coherency, coherency_of, complexity
from saltern.pipeline.metrics.faithfulness.passes import black_level


def explain(x_BCHW: Tensor, target_B: Tensor) -> Tensor:
    """A method with a known map: the colour of the target's number, squared."""
    return x_BCHW[torch.arange(len(x_BCHW)), target_B % 3] ** 2


@pytest.mark.parametrize("multiply", ["pixels", "normalised"])
def test_coherency_and_complexity_are_those_of_the_definitions(multiply: str) -> None:
    x_BCHW, _, target_B = batch()
    map_BHW = explain(x_BCHW, target_B)
    black_C11 = black_level(MEAN, STD, multiply, torch.device("cpu"))
    found_B = coherency(explain, x_BCHW, map_BHW, target_B, black_C11)
    for at, x_CHW in enumerate(x_BCHW):
        unit_HW = naive_unit(map_BHW[at])
        again_HW = explain(naive_masked(x_CHW, unit_HW, multiply)[None], target_B[at, None])[0]
        correlation = pearsonr(unit_HW.flatten().double(), again_HW.flatten().double()).statistic
        assert float(found_B[at]) == pytest.approx((1 + correlation) / 2, abs=1e-5)
        assert float(complexity(map_BHW)[at]) == pytest.approx(float(unit_HW.sum()) / 144, rel=1e-5)
    assert found_B.std() > 1e-3


def test_answers_by_hand() -> None:
    map_BHW = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]], [[3.0, 3.0, 3.0]]])
    other_BHW = torch.tensor([[[5.0, 7.0, 9.0]], [[1.0, 0.0, -1.0]], [[4.0, 4.0, 4.0]], [[0.0, 1.0, 2.0]]])
    assert coherency_of(map_BHW, other_BHW).tolist() == pytest.approx([1, 0, 0, 0])
    assert complexity(map_BHW).tolist() == pytest.approx([0.5, 0.5, 0.5, 1])
    ones, halves = torch.ones(3), torch.full((3,), 0.5)
    assert adcc(ones, 1 - ones, 1 - ones).tolist() == [1, 1, 1]
    assert adcc(halves, halves, torch.tensor([0.5, 0.0, 1.0])).tolist() == pytest.approx([0.5, 0.6, 0])
    assert arcc(halves, halves, torch.tensor([0.25, 0.0, -0.1])).tolist() == pytest.approx([3 / 8, 0, 0])
