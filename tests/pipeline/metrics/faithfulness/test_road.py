"""ROAD equals pytorch-grad-cam's, image by image; its ties, noise and passes are as stated."""

import numpy as np
import pytest
import torch
from naive_faithfulness import Counted, batch, naive_probability, network, one_pixel
from pytorch_grad_cam.metrics.road import ROADCombined, ROADLeastRelevantFirstAverage, ROADMostRelevantFirstAverage
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

from saltern.pipeline.metrics.faithfulness.passes import target_probability
from saltern.pipeline.metrics.faithfulness.road import PERCENTILES, road

pytestmark = pytest.mark.slow
SEEDS = torch.tensor([5, 6, 7])


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # the peer gives tensors to numpy
@pytest.mark.parametrize("percentiles", [PERCENTILES, (10, 50, 73)])
def test_road_is_that_of_pytorch_grad_cam(monkeypatch: pytest.MonkeyPatch, percentiles: tuple[int, ...]) -> None:
    model = network()
    x_BCHW, map_BHW, target_B = batch(side=17)
    map_BHW = (map_BHW + 1) / 4  # so that 1 - map has no ties either
    found = road(model, x_BCHW, map_BHW, target_B, SEEDS, percentiles=percentiles, noise=0)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the peer's noise has no switch there
    targets = [ClassifierOutputSoftmaxTarget(int(target)) for target in target_B]
    for values_B, peer in (
        (found.combined_B, ROADCombined),
        (found.morf_B, ROADMostRelevantFirstAverage),
        (found.lerf_B, ROADLeastRelevantFirstAverage),
    ):
        expected = peer(list(percentiles))(x_BCHW, map_BHW.numpy(), targets, model)
        np.testing.assert_allclose(values_B.numpy(), expected, atol=2e-4)
    assert found.combined_B.abs().min() > 1e-3


def test_a_network_that_reads_one_pixel_by_hand() -> None:
    """A removed pixel takes the value of its neighbours, here 0."""
    x_BCHW = torch.zeros(2, 3, 8, 8)
    x_BCHW[:, 0, 3, 3] = 2.0
    map_BHW = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    map_BHW[0, 3, 3], map_BHW[1, 3, 3] = 2, -1  # the most and the least relevant
    found = road(one_pixel(3, 3), x_BCHW, map_BHW, torch.zeros(2, dtype=torch.int64), SEEDS[:2], noise=0)
    change = float(torch.tensor(2.0).sigmoid()) - 0.5
    torch.testing.assert_close(found.morf_B, torch.tensor([-change, 0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.lerf_B, torch.tensor([0, -change]), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.combined_B, torch.tensor([change / 2, -change / 2]), rtol=0, atol=1e-3)


def test_a_constant_map_has_no_score() -> None:
    x_BCHW, map_BHW, target_B = batch()
    constant = road(network(), x_BCHW, torch.zeros_like(map_BHW), target_B, SEEDS, noise=0)
    torch.testing.assert_close(constant.combined_B, torch.zeros(3), rtol=0, atol=1e-6)


def test_noise_follows_the_seed_of_each_sample_and_has_its_size() -> None:
    x_BCHW, map_BHW, target_B = batch()
    together = road(network(), x_BCHW, map_BHW, target_B, SEEDS)
    single = road(network(), x_BCHW[1:2], map_BHW[1:2], target_B[1:2], SEEDS[1:2], batch=3)
    torch.testing.assert_close(single.combined_B, together.combined_B[1:2], rtol=0, atol=1e-5)
    other = road(network(), x_BCHW, map_BHW, target_B, SEEDS + 1)
    assert not torch.equal(other.combined_B, together.combined_B)
    seen: list[torch.Tensor] = []
    for noise in (0.0, 0.5):
        road(
            lambda x_BCHW: seen.append(x_BCHW) or x_BCHW[:, :, 0, 0], x_BCHW, map_BHW, target_B % 3, SEEDS, noise=noise
        )
    clean, noisy = seen[1], seen[3]
    changed = (noisy != clean).all(1)
    assert changed.float().mean((1, 2)).reshape(2, 4, 3).mean((0, 2)).tolist() == pytest.approx(
        [0.8, 0.6, 0.4, 0.2], abs=0.01
    )
    assert float((noisy - clean).movedim(1, -1)[changed].std()) == pytest.approx(0.5, rel=0.05)
    first, second = (noisy - clean).view(2, 4, 3, 3, 12, 12)[0, :2]
    both = changed.view(2, 4, 3, 12, 12)[0, 1]  # removed at both percentiles
    assert (first != second).movedim(1, -1)[both].all()  # each image has its own noise


def test_orders_and_percentiles_share_passes() -> None:
    x_BCHW, map_BHW, target_B = batch(8)
    seed_B = torch.arange(8)
    counted = Counted(network())
    whole_B = target_probability(network(), x_BCHW, target_B)
    found = road(counted, x_BCHW, map_BHW, target_B, seed_B, batch=8, whole_B=whole_B)
    assert counted.passes == [8] * 8
    counted.passes.clear()
    large = road(counted, x_BCHW, map_BHW, target_B, seed_B, batch=50)
    assert counted.passes == [8, 50, 14]
    torch.testing.assert_close(large.combined_B, found.combined_B, rtol=0, atol=1e-5)
    assert float(whole_B[0]) == pytest.approx(naive_probability(network(), x_BCHW[0], int(target_B[0])), abs=1e-6)
