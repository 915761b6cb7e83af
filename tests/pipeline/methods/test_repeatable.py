"""No method uses an operation that does not repeat on CUDA, or one that waits for it: every operation is watched here.

On a GPU such operations raise under `--deterministic`; where none is at hand, this walk finds them.
"""

import pytest
import torch
from networks import randomise
from operations import RAISING, WAITING, operations
from test_contract import NAMES, build
from torch import nn

from saltern.pipeline.maps.discretize import discretize, upsample
from saltern.pipeline.models.pools import EvenPool, use_even_pools
from saltern.schemas.rules import Rule


class Pooled(nn.Module):
    """A network of VGG's parts: max pooling, and adaptive pooling to several cells."""

    def __init__(self, cells=2):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(3, 2, 1))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(cells), nn.Linear(8 * cells * cells, 5)

    def forward(self, x):
        return self.fc(self.pool(self.second(self.first(x))).flatten(1))


@pytest.fixture
def pooled():
    torch.manual_seed(0)
    model = randomise(Pooled())
    use_even_pools(model)
    return model


WAITS = {
    "ablation-cam": {"_local_scalar_dense"},  # compares the logits of two passes, once a batch
    "cameras": {"_local_scalar_dense"},  # of a plan, which is made on the CPU, once for each size of input
    "shapley-cam": {"scatter_add"},  # differentiates the score twice
}


@pytest.mark.parametrize("name", NAMES)
def test_no_method_uses_an_operation_that_does_not_repeat(name, pooled, tiny, images):
    layer = {"layer": "first"} if name.endswith(("cam", "cam++", "cameras")) and name != "cam" else {}
    with build(name, tiny if name == "cam" else pooled, **layer) as method:
        seen = operations(lambda: method.explain(images(2, 24), number=2 if method.needs_target else 1))
    assert "convolution" in seen
    assert not seen & RAISING
    assert seen & WAITING == WAITS.get(name, set())


@pytest.mark.parametrize("name", ["gradient", "grad-cam", "lrp", "relevance-cam"])
@pytest.mark.parametrize("model_name", ["small_vit", "small_swin"])
def test_nor_do_transformers(name, model_name, network, images):
    with build(name, network(model_name)) as method:
        seen = operations(lambda: method(images(2, 64)))
    assert not seen & RAISING


@pytest.mark.parametrize("rule", ["mean:1", "otsu", "quantile:0.9", "fraction", "mean-std:1", "fixed:0.5", "max:0.5"])
def test_nor_do_masks(rule, images):
    seen = operations(lambda: discretize(upsample(images(2, 8)[:, 0], (24, 24)), Rule.parse(rule)))
    assert not seen & RAISING


def test_the_walk_finds_an_operation_that_does_not_repeat(images):
    torch.manual_seed(0)
    with build("gradient", randomise(Pooled())) as method:  # its pool is torch's
        assert operations(lambda: method(images(2, 24))) & RAISING == {"_adaptive_avg_pool2d_backward"}


@pytest.mark.parametrize(("side", "cells"), [(7, 7), (14, 7), (12, (3, 4))])
def test_an_even_pool_is_the_adaptive_one(side, cells, images):
    x = images(2, side).requires_grad_()
    module = nn.Sequential(nn.AdaptiveAvgPool2d(cells))
    expected = module(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    use_even_pools(module)
    assert type(module[0]) is EvenPool
    found = module(x)
    torch.testing.assert_close(found, expected)
    assert side != cells or torch.equal(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient)
    assert operations(lambda: torch.autograd.grad(module(x).sum(), x)) & RAISING == set()


def test_other_pools_stay_as_they_are(images):
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((None, 2)), nn.AdaptiveAvgPool2d(5))
    x = images(2, 7)
    expected = [pool(x) for pool in module]
    use_even_pools(module)
    assert [type(pool) is EvenPool for pool in module] == [False, True, True]
    assert all(torch.equal(pool(x), before) for pool, before in zip(module, expected, strict=True))
