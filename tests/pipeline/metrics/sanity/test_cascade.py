"""The cascade tells maps that depend on the weights from those that do not."""

import pickle
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
from saltern.pipeline.metrics.sanity.cascade import Cascade, cascade
from saltern.pipeline.metrics.sanity.randomise import Randomised, layers_from_the_logits
from saltern.pipeline.metrics.sanity.verdict import COLUMNS, FAILS, PASSES, UNDECIDED, Curves, Figure

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


def found_by(method: Any, x_BCHW: Tensor, target_B: Tensor | None = None, **options: Any) -> Cascade:
    randomised = Randomised(model(), layers_from_the_logits(model(), SIDE), **options)
    return cascade(model(), method, x_BCHW, target_B, randomised)


def columns(found: Cascade) -> dict[str, Any]:
    stages = {name: np.stack([getattr(one, f"{name}_B").numpy() for one in found.stages]) for name in COLUMNS}
    return {
        **stages,
        "constant": np.stack([one.constant_B.numpy() for one in found.stages]),
        "before": found.entropy_B.numpy(),
    }


def summed(*parts: Cascade) -> Curves:
    made = Curves()
    for found in parts:
        made.add([stage.layer for stage in found.stages], columns(found))
    return made


def curves(method: Any, count: int = 6, **options: Any) -> Curves:
    return summed(found_by(method, images(count), **options))


def grad_cam(net: nn.Module) -> Method:
    return build("grad-cam", net, layer="body")


@pytest.mark.slow
def test_each_stage_is_that_of_a_loop_over_images() -> None:
    target_B = torch.tensor([0, 1, 2, 3, 4, 0])
    found = found_by(lambda net: build("gradient", net), images(), target_B, seed=5)
    names = layers_from_the_logits(model(), SIDE)
    assert [stage.layer for stage in found.stages] == names
    for (_, changed), stage in zip(Randomised(model(), names, seed=5), found.stages, strict=True):
        for number in range(6):
            pair = []
            for net in (model(), changed):
                map_1hw = build("gradient", net)(images()[number : number + 1], target_B[number : number + 1])
                pair.append(upsample(map_1hw, (SIDE, SIDE)).flatten().numpy())
            assert float(stage.spearman_B[number]) == pytest.approx(spearmanr(*pair).statistic, abs=1e-5)


def test_a_map_of_edges_fails_and_a_map_of_the_model_passes() -> None:
    edges = curves(Edges)
    assert edges.verdict() == FAILS
    assert edges.figure("area").value == pytest.approx(1)
    assert [figure.value for figure in edges.stages("ssim")] == pytest.approx([1] * 4)
    assert edges.figure("rise").value == pytest.approx(0)
    assert curves(grad_cam, 24, seed=1).verdict() == PASSES


def test_the_absolute_map_judges_a_method_whose_sign_alone_changes() -> None:
    seed = next(seed for seed in range(9) if curves(Signed, seed=seed).figure("area_signed").value < 0)
    found = curves(Signed, seed=seed)
    assert found.figure("area").value == pytest.approx(1)
    assert found.verdict() == FAILS


def test_a_constant_map_counts_as_no_correlation() -> None:
    cascaded = found_by(Nothing, images())
    assert np.array_equal(columns(cascaded)["absolute"], np.zeros((4, 6)))
    found = summed(cascaded)
    assert found.summary()["stages"][-1]["constant"] == 6
    assert found.summary()["entropy_rise"] == {"value": None, "plus_minus": None}


def test_batches_join_to_the_cascade_of_all_images() -> None:
    target_B = torch.zeros(6, dtype=torch.long)
    whole = found_by(grad_cam, images(), target_B)
    randomised = Randomised(model(), layers_from_the_logits(model(), SIDE))  # one for all batches, as a worker has
    starts = (0, 2, 4)
    parts = [cascade(model(), grad_cam, images()[at : at + 2], target_B[:2], randomised) for at in starts]
    for name in COLUMNS:
        joined = np.concatenate([columns(part)[name] for part in parts], 1)
        assert joined == pytest.approx(columns(whole)[name], abs=1e-5)
    assert summed(*parts).images == 6


def test_sums_over_parts_are_those_over_all_images() -> None:
    draw = np.random.default_rng(0)
    every = {name: draw.random((3, 50)) for name in COLUMNS} | {"constant": draw.random((3, 50)) > 0.5}
    every["before"] = draw.random(50)
    parted = Curves()
    for start, end in pairwise((0, 1, 20, 20, 50)):
        parted.add(["a", "b", "c"], {name: values[..., start:end] for name, values in every.items()})
    for name in COLUMNS:
        for stage, figure in enumerate(parted.stages(name)):
            values = every[name][stage]
            assert figure.value == pytest.approx(values.mean())
            assert figure.plus_minus == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(50))
    assert parted.figure("rise").value == pytest.approx(np.mean(every["entropy"][-1] / every["before"] - 1))
    assert parted.constant_S.tolist() == every["constant"].sum(1).tolist()


def test_sums_do_not_grow_with_the_images() -> None:
    part = {name: np.ones((3, 100)) for name in (*COLUMNS, "constant")} | {"before": np.ones(100)}
    made, sizes = Curves(), []
    for _ in range(50):
        made.add(["a", "b", "c"], part)
        sizes.append(len(pickle.dumps(made)))
    assert made.images == 5000
    assert sizes[-1] < sizes[0] + 50


def test_one_stage_gives_the_entropies_and_no_verdict() -> None:
    quick = curves(lambda net: build("gradient", net), stages=1)
    all_stages = curves(lambda net: build("gradient", net))
    assert quick.layers == ["body.0"]
    assert quick.figure("rise").value == pytest.approx(all_stages.figure("rise").value)
    assert quick.verdict() == UNDECIDED


def test_the_area_is_that_of_trapezoids_from_one() -> None:
    cascaded = found_by(grad_cam, images())
    found, expected = summed(cascaded), []
    for column in columns(cascaded)["absolute"].T:
        points = [1.0, *column]
        expected.append(sum((a + b) / 2 for a, b in pairwise(points)) / len(column))
    assert found.figure("area").value == pytest.approx(np.mean(expected))
    assert found.figure("area").plus_minus == pytest.approx(1.96 * np.std(expected, ddof=1) / np.sqrt(6))
    assert np.isnan(Figure.of(np.ones(1)).plus_minus)
