"""All methods on real photographs with a pretrained network: what the literature says of their maps."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from test_contract import NAMES
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.methods import build
from saltern.pipeline.models.classifiers import Classifier, load
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples

SMALL = {
    "ablation-cam": {"layer": "_blocks.0"},  # of 16 channels
    "cameras": {"sizes": [224, 324, 424]},
    "integrated-gradients": {"steps": 4},
    "occlusion": {"window": 56, "stride": 56},
    "rise": {"masks": 8},
    "score-cam": {"layer": "_blocks.0"},
    "smoothgrad": {"samples": 4},
}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load("efficientnet_lite0")


@pytest.fixture(scope="module")
def photographs(shared_data: Path, classifier: Classifier) -> Tensor:
    shards, _ = expand([str(shared_data / "imagenet-sample")])
    how = classifier.preprocess
    samples = [sample for sample, _ in zip(read_samples(shards[0]), range(6), strict=False)]
    pixels = [decode(sample.image, how).pixels_HWC for sample in samples[::2]]
    x_BCHW = torch.stack([torch.as_tensor(image).permute(2, 0, 1) for image in pixels]) / 255
    return (x_BCHW - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(how.std).view(3, 1, 1)


@pytest.fixture(scope="module")
def maps(classifier: Classifier, photographs: Tensor) -> Callable[..., Tensor]:
    @cache
    def make(name: str) -> Tensor:
        with build(name, classifier.model, **SMALL.get(name, {})) as method:
            found = method(photographs)
            assert found.isfinite().all()
            assert not method.last.zero_B.any()
            assert not method.last.nonfinite_B.any()
        assert isinstance(found, Tensor)
        return found

    return make


def in_few_pixels(map_Bhw: Tensor) -> Tensor:
    """Share of the map's magnitude in the largest twentieth of its pixels."""
    sorted_BN = map_Bhw.abs().flatten(1).sort(1, descending=True).values
    return sorted_BN[:, : sorted_BN.shape[1] // 20].sum(1) / sorted_BN.sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_no_photograph_gives_a_zero_or_broken_map(name: str, maps: Callable[..., Tensor]) -> None:
    found = maps(name)
    assert (found.flatten(1).std(1) > 0).all()


def test_guided_backpropagation_and_lrp_are_sharper_than_the_gradient(maps: Callable[..., Tensor]) -> None:
    gradient = in_few_pixels(maps("gradient"))
    assert (in_few_pixels(maps("guided-backprop")) > gradient + 0.02).all()
    assert in_few_pixels(maps("lrp")).mean() > gradient.mean() + 0.05


def test_cameras_is_finer_than_grad_cam_and_about_the_same_place(maps: Callable[..., Tensor]) -> None:
    fine_BHW, coarse_Bhw = maps("cameras"), maps("grad-cam")
    coarse_BHW = F.interpolate(coarse_Bhw[:, None], size=fine_BHW.shape[1:], mode="bilinear")[:, 0]

    def steepness(map_BHW: Tensor) -> Tensor:
        down, across = map_BHW.diff(dim=1).square().mean((1, 2)), map_BHW.diff(dim=2).square().mean((1, 2))
        return (down + across).sqrt() / map_BHW.flatten(1).std(1)

    assert (steepness(fine_BHW) > 1.05 * steepness(coarse_BHW)).all()
    pairs = zip(fine_BHW.flatten(1), coarse_BHW.flatten(1), strict=True)
    assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.8 for pair in pairs)


def test_relevance_cam_and_cam_agree_on_the_last_stage(maps: Callable[..., Tensor]) -> None:
    pairs = zip(maps("relevance-cam").flatten(1), maps("cam").flatten(1), strict=True)
    assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.7 for pair in pairs)
