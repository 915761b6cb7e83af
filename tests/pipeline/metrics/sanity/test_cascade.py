"""The cascade tells maps that depend on the weights from those that do not."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from making import tiny
from scipy.stats import spearmanr
from torch import Tensor, nn

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.methods import Method, build
from saltern.pipeline.methods.base import Maps
from saltern.pipeline.metrics.sanity.cascade import cascade
from saltern.pipeline.metrics.sanity.randomise import layers_from_the_logits, randomised
from saltern.pipeline.metrics.sanity.verdict import FAILS, PASSES, UNDECIDED, Curves, Figure

SIDE = 32


class Edges(Method):
    """A map of the image that asks the model nothing but its logits."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        return x_BCHW.diff(dim=3, append=x_BCHW[..., :1]).abs().sum(1), self.model(x_BCHW), target_B


class Signed(Edges):
    """A map whose sign flips with the sign of the first weight of the head."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        sign = self.model.get_submodule("head").weight.flatten()[0].sign()
        return sign * x_BCHW.sum(1), self.model(x_BCHW), target_B


class Nothing(Edges):
    """A map of zeros."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        return torch.zeros_like(x_BCHW[:, 0]), self.model(x_BCHW), target_B


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny()


def curves(method: Any, count: int = 6, **options: Any) -> Curves:
    found = Curves()
    found.add(cascade(model(), method, images(count), None, **options))
    return found


def grad_cam(net: nn.Module) -> Method:
    return build("grad-cam", net, layer="body")


def test_each_stage_is_that_of_a_loop_over_images() -> None:
    target_B = torch.tensor([0, 1, 2, 3, 4, 0])
    found = cascade(model(), lambda net: build("gradient", net), images(), target_B, seed=5)
    names = layers_from_the_logits(model(), SIDE)
    assert [stage.layer for stage in found.stages] == names
    for (_, changed), stage in zip(randomised(model(), names, seed=5), found.stages, strict=True):
        for number in range(6):
            pair = []
            for net in (model(), changed):
                map_1hw = build("gradient", net)(images()[number : number + 1], target_B[number : number + 1])
                pair.append(upsample(map_1hw, (SIDE, SIDE)).flatten().numpy())
            assert float(stage.spearman_B[number]) == pytest.approx(spearmanr(*pair).statistic, abs=1e-5)


def test_a_map_of_edges_fails_and_a_map_of_the_model_passes() -> None:
    edges = curves(Edges)
    assert edges.verdict() == FAILS
    assert edges.area().value == pytest.approx(1)
    assert [figure.value for figure in edges.stages("ssim")] == pytest.approx([1] * 4)
    assert edges.rise().value == pytest.approx(0)
    assert curves(grad_cam, 24, seed=1).verdict() == PASSES


def test_the_absolute_map_judges_a_method_whose_sign_alone_changes() -> None:
    seed = next(seed for seed in range(9) if curves(Signed, seed=seed).area("spearman").value < 0)
    found = curves(Signed, seed=seed)
    assert found.area().value == pytest.approx(1)
    assert found.verdict() == FAILS


def test_a_constant_map_counts_as_no_correlation() -> None:
    found = curves(Nothing)
    assert np.array_equal(found.values("absolute"), np.zeros((4, 6)))
    assert found.summary()["stages"][-1]["constant"] == 6
    assert found.summary()["entropy_rise"] == {"value": None, "plus_minus": None}


def test_batches_join_to_the_cascade_of_all_images() -> None:
    whole, parts = Curves(), Curves()
    target_B = torch.zeros(6, dtype=torch.long)
    whole.add(cascade(model(), grad_cam, images(), target_B))
    for start in (0, 2, 4):
        parts.add(cascade(model(), grad_cam, images()[start : start + 2], target_B[:2]))
    for name in ("absolute", "ssim", "entropy"):
        assert parts.values(name) == pytest.approx(whole.values(name), abs=1e-5)
    assert parts.images == 6


def test_one_stage_gives_the_entropies_and_no_verdict() -> None:
    quick = curves(lambda net: build("gradient", net), stages=1)
    all_stages = curves(lambda net: build("gradient", net))
    assert quick.layers == ["body.0"]
    assert quick.rise().value == pytest.approx(all_stages.rise().value)
    assert quick.verdict() == UNDECIDED


def test_the_area_is_that_of_trapezoids_from_one() -> None:
    found = curves(grad_cam)
    expected = []
    for column in found.values("absolute").T:
        points = [1.0, *column]
        expected.append(sum((a + b) / 2 for a, b in pairwise(points)) / len(column))
    assert found.area().value == pytest.approx(np.mean(expected))
    assert found.area().plus_minus == pytest.approx(1.96 * np.std(expected, ddof=1) / np.sqrt(6))
    assert np.isnan(Figure.of(np.ones(1)).plus_minus)
