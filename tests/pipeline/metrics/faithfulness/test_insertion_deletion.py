"""Deletion and insertion equal loops over pixels, torch-cam's metric and answers by hand, in the promised passes."""

from functools import partial

import pytest
import torch
from naive_faithfulness import (
    Counted,
    Given,
    batch,
    naive_area,
    naive_blur,
    naive_curve,
    naive_probability,
    network,
    one_pixel,
)
from torchcam.metrics import DeletionInsertionMetric

from saltern.pipeline.metrics.faithfulness.curves import blurred, deletion, insertion, ranks


@pytest.mark.parametrize("baseline", ["zero", "blur"])
@pytest.mark.parametrize(("steps", "size"), [(9, 2), (7, 64)])  # 144 pixels in equal and in unequal groups
def test_curves_are_those_of_pixels_that_change_one_by_one(baseline: str, steps: int, size: int) -> None:
    model = network()
    x_BCHW, map_BHW, target_B = batch()
    removed = deletion(model, x_BCHW, map_BHW, target_B, steps=steps, batch=size, baseline=baseline)
    inserted = insertion(model, x_BCHW, map_BHW, target_B, steps=steps, batch=size, baseline=baseline)
    for at, x_CHW in enumerate(x_BCHW):
        base_CHW = naive_blur(x_CHW) if baseline == "blur" else torch.zeros_like(x_CHW)
        for found, pair in ((removed, (x_CHW, base_CHW)), (inserted, (base_CHW, x_CHW))):
            curve = naive_curve(model, *pair, map_BHW[at], int(target_B[at]), steps)
            assert found.probability_BS[at].tolist() == pytest.approx(curve, abs=1e-5)
            assert float(found.area_B[at]) == pytest.approx(naive_area(curve), abs=1e-5)
    assert removed.area_B.std() > 1e-4  # samples differ


def test_areas_are_those_of_torchcam() -> None:
    model = network()
    x_BCHW, map_BHW, target_B = batch(side=20)
    map_BHW = (map_BHW * 10).round()  # with ties
    settings = {"steps": 50, "baseline": blurred, "batch_size": 16}
    metric = DeletionInsertionMetric(Given(model, map_BHW), partial(torch.softmax, dim=-1), **settings)
    metric.update(x_BCHW, target_B.tolist())
    found = [function(model, x_BCHW, map_BHW, target_B, baseline="blur").area_B for function in (deletion, insertion)]
    assert float(found[0].mean()) == pytest.approx(metric.summary()["deletion_auc"], abs=1e-6)
    assert float(found[1].mean()) == pytest.approx(metric.summary()["insertion_auc"], abs=1e-6)


def test_a_network_that_reads_one_pixel_by_hand() -> None:
    logits = one_pixel(2, 1)
    x_BCHW = torch.zeros(2, 3, 4, 4)
    x_BCHW[:, 0, 2, 1] = 2.0
    map_BHW = torch.zeros(2, 4, 4)
    map_BHW[0, 2, 1] = 1  # found; in the other map it is the 10th of equals
    target_B = torch.zeros(2, dtype=torch.int64)
    on, off = float(torch.tensor(2.0).sigmoid()), 0.5
    removed = deletion(logits, x_BCHW, map_BHW, target_B, steps=16)
    assert removed.probability_BS[0].tolist() == pytest.approx([on] + [off] * 16)
    assert removed.probability_BS[1].tolist() == pytest.approx([on] * 10 + [off] * 7)
    assert removed.area_B.tolist() == pytest.approx([off + (on - off) / 32, off + (on - off) * 9.5 / 16])
    inserted = insertion(logits, x_BCHW, map_BHW, target_B, steps=16, baseline="zero")
    assert inserted.probability_BS[0].tolist() == pytest.approx([off] + [on] * 16)
    assert inserted.area_B.tolist() == pytest.approx([on - (on - off) / 32, on - (on - off) * 9.5 / 16])


def test_equal_values_rank_by_index() -> None:
    assert ranks(torch.tensor([[[1.0, 3.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])).tolist() == [
        [2, 0, 1, 3],
        [0, 1, 2, 3],
    ]


@pytest.mark.parametrize(("samples", "size", "passes"), [(8, 8, [8] * 50), (3, 64, [64, 64, 22]), (8, 5, [5] * 80)])
def test_samples_and_steps_share_passes(samples: int, size: int, passes: list[int]) -> None:
    counted = Counted(network())
    x_BCHW, map_BHW, target_B = batch(samples)
    whole_B = torch.tensor(
        [naive_probability(counted.logits, x_CHW, k) for x_CHW, k in zip(x_BCHW, target_B, strict=True)]
    )
    for function in (deletion, insertion):
        counted.passes.clear()
        found = function(counted, x_BCHW, map_BHW, target_B, batch=size, whole_B=whole_B)
        assert counted.passes == passes
        plain = function(counted.logits, x_BCHW, map_BHW, target_B)
        torch.testing.assert_close(found.probability_BS, plain.probability_BS, rtol=0, atol=1e-6)


def test_curves_do_not_depend_on_the_scale_of_the_map() -> None:
    x_BCHW, map_BHW, target_B = batch()
    one, other = (deletion(network(), x_BCHW, made_BHW, target_B).area_B for made_BHW in (map_BHW, map_BHW * 8 - 3))
    assert one.tolist() == other.tolist()


def test_autocast_leaves_baseline_and_probabilities_in_float32() -> None:
    x_BCHW, map_BHW, target_B = batch(side=32)
    exact = insertion(network(), x_BCHW, map_BHW, target_B)
    blurred_BCHW = blurred(x_BCHW)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blurred(x_BCHW), blurred_BCHW)
        half = insertion(network(), x_BCHW, map_BHW, target_B)
    assert half.area_B.dtype == half.probability_BS.dtype == torch.float32
    torch.testing.assert_close(half.probability_BS, exact.probability_BS, rtol=0, atol=0.05)


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(ValueError, match="'noise', not one of zero, blur"):
        deletion(network(), *batch(), baseline="noise")
