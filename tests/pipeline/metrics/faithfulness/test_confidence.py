"""Average drop, increase and densities equal loops, torch-cam's metric and answers by hand."""

import math
from functools import partial

import pytest
import torch
from naive_faithfulness import (
    MEAN,
    STD,
    Counted,
    Given,
    batch,
    naive_masked,
    naive_probability,
    naive_unit,
    network,
    one_pixel,
)
from torchcam.metrics import ClassificationMetric

from saltern.pipeline.metrics.faithfulness.confidence import average_drop, densities, marked_probability
from saltern.pipeline.metrics.faithfulness.passes import black_level, masked, target_probability, unit_maps

CPU = torch.device("cpu")
NORMALISED = black_level(MEAN, STD, "normalised", CPU)


@pytest.mark.parametrize("multiply", ["pixels", "normalised"])
def test_all_are_those_of_loops(multiply: str) -> None:
    model, black_C11 = network(), black_level(MEAN, STD, multiply, CPU)
    x_BCHW, map_BHW, target_B = batch(8)
    drop = average_drop(model, x_BCHW, map_BHW, target_B, black_C11)
    density = densities(model, x_BCHW, map_BHW, target_B, black_C11, batch=3)
    for at, x_CHW in enumerate(x_BCHW):
        target, weight_HW = int(target_B[at]), naive_unit(map_BHW[at])
        whole, marked, rest = (
            naive_probability(model, made_CHW, target)
            for made_CHW in (x_CHW, *(naive_masked(x_CHW, some_HW, multiply) for some_HW in (weight_HW, 1 - weight_HW)))
        )
        assert float(drop.drop_B[at]) == pytest.approx(max(0, whole - marked) / whole, abs=1e-5)
        assert bool(drop.increase_B[at]) == (marked > whole)
        assert float(density.positive_B[at]) == pytest.approx(marked / float(weight_HW.mean()), rel=1e-4)
        assert float(density.negative_B[at]) == pytest.approx(rest / float((1 - weight_HW).mean()), rel=1e-4)
    assert set(drop.increase_B.tolist()) == {True, False}


def test_drop_and_increase_are_those_of_torchcam() -> None:
    model = network()
    x_BCHW, map_BHW, target_B = batch(8)
    metric = ClassificationMetric(Given(model, unit_maps(map_BHW)), partial(torch.softmax, dim=-1))
    metric.update(x_BCHW, target_B.tolist())
    found = average_drop(model, x_BCHW, map_BHW, target_B, NORMALISED)
    assert float(found.drop_B.mean()) == pytest.approx(metric.summary()["avg_drop"], abs=1e-6)
    assert float(found.increase_B.float().mean()) == pytest.approx(metric.summary()["conf_increase"])


def test_a_network_that_reads_one_pixel_by_hand() -> None:
    logits, target_B = one_pixel(1, 2), torch.zeros(3, dtype=torch.int64)
    x_BCHW = torch.full((3, 3, 4, 4), 2.0)
    map_BHW = torch.zeros(3, 4, 4)
    map_BHW[0, 1, 2] = 7  # found; the second map is of zeros
    map_BHW[2, 3, 3] = 1  # missed
    on, off = float(torch.tensor(2.0).sigmoid()), 0.5
    drop = average_drop(logits, x_BCHW, map_BHW, target_B, NORMALISED)
    assert drop.drop_B.tolist() == pytest.approx([0, (on - off) / on, (on - off) / on])
    assert drop.increase_B.tolist() == [False] * 3
    density = densities(logits, x_BCHW, map_BHW, target_B, NORMALISED)
    assert density.positive_B.tolist() == pytest.approx([on * 16, math.nan, off * 16], nan_ok=True)
    assert density.negative_B.tolist() == pytest.approx([off * 16 / 15, on, on * 16 / 15])


def test_the_whole_image_changes_nothing() -> None:
    x_BCHW, map_BHW, target_B = batch()
    black_C11 = black_level(MEAN, STD, "pixels", CPU)
    ones_BHW = torch.ones_like(map_BHW)
    assert torch.equal(masked(x_BCHW, ones_BHW, black_C11), x_BCHW)
    drop = average_drop(network(), x_BCHW, ones_BHW, target_B, black_C11)
    assert drop.drop_B.tolist() == [0, 0, 0]
    assert not drop.increase_B.any()
    density = densities(network(), x_BCHW, ones_BHW, target_B, black_C11)
    assert density.positive_B.tolist() == target_probability(network(), x_BCHW, target_B).tolist()
    assert density.negative_B.isnan().all()


def test_a_target_without_probability_has_no_drop() -> None:
    sure = lambda x_BCHW: torch.tensor([[1000.0, 0.0]]).expand(len(x_BCHW), -1)  # noqa: E731
    drop = average_drop(sure, *batch()[:2], torch.ones(3, dtype=torch.int64), NORMALISED)
    assert drop.drop_B.tolist() == [0, 0, 0]


def test_known_probabilities_save_passes() -> None:
    counted = Counted(network())
    x_BCHW, map_BHW, target_B = batch(5)
    arguments = (x_BCHW, map_BHW, target_B, NORMALISED)
    marked_B = marked_probability(counted, *arguments, batch=2)
    assert counted.passes == [2, 2, 1]
    average_drop(counted, *arguments, whole_B=target_probability(network(), x_BCHW, target_B), marked_B=marked_B)
    assert len(counted.passes) == 3
    densities(counted, *arguments, batch=4, marked_B=marked_B)
    assert counted.passes[3:] == [4, 1]


def test_maps_are_scaled_one_by_one() -> None:
    map_BHW = torch.tensor([[[1.0, 3.0]], [[-2.0, 2.0]], [[5.0, 5.0]], [[0.0, 0.0]], [[-1.0, -1.0]]])
    assert unit_maps(map_BHW).tolist() == [[[0, 1]], [[0, 1]], [[1, 1]], [[0, 0]], [[0, 0]]]


def test_autocast_leaves_probabilities_in_float32() -> None:
    x_BCHW, map_BHW, target_B = batch(side=32)
    exact = average_drop(network(), x_BCHW, map_BHW, target_B, NORMALISED)
    with torch.autocast("cpu", torch.bfloat16):
        half = average_drop(network(), x_BCHW, map_BHW, target_B, NORMALISED)
    assert half.drop_B.dtype == torch.float32
    torch.testing.assert_close(half.drop_B, exact.drop_B, rtol=0, atol=0.05)


def test_an_unknown_way_to_multiply_is_named() -> None:
    with pytest.raises(ValueError, match="'bytes', not one of pixels, normalised"):
        black_level(MEAN, STD, "bytes", CPU)
