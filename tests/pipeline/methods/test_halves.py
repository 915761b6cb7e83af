"""Under autocast, weights are cast once and not at every call; maps are those of plain autocast, to the bit."""

import copy

import pytest
import torch
from test_contract import NAMES, build
from torch import nn

from saltern.pipeline.models.halves import Casts, full_of, full_weights

DTYPES = [torch.bfloat16, torch.float16]


def explain(method, x, target, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        return method(x, target if method.needs_target else None)


def casts_of(method, x, target):
    with Casts() as casts:
        explain(method, x, target)
    return len(casts.cast)


@pytest.mark.parametrize(("name", "model_name", "before"), [
    ("cam", "resnet18", 22), ("grad-cam", "resnet18", 22), ("relevance-cam", "resnet18", 22), ("lrp", "resnet18", 22),
    ("grad-cam", "small_vit", 20), ("eigen-cam", "small_swin", 37),
])  # fmt: skip
def test_no_weight_is_cast_at_a_call(name, model_name, before, network, images):
    x, target = images(2, 64), torch.tensor([1, 2])
    with build(name, copy.deepcopy(network(model_name))) as method:
        assert casts_of(method, x, target) == before
        method.halve(x, torch.bfloat16)
        assert casts_of(method, x, target) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_autocast(name, dtype, tiny, images):
    x, target = images(2, 24), torch.tensor([1, 2])
    with build(name, tiny) as method:
        expected, logits_BK = explain(method, x, target, dtype), method.last.logits_BK
        method.halve(x, dtype)
        assert torch.equal(explain(method, x, target, dtype), expected)
        assert torch.equal(method.last.logits_BK, logits_BK)


class Mixed(nn.Module):
    """Network that uses one weight under autocast and in float32, one in float32 alone, and one twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.plain, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.again = nn.BatchNorm2d(3), self.twice

    def forward(self, x):
        x = self.again(self.twice(self.shared(x)))
        with torch.autocast("cpu", enabled=False):
            x = self.plain(x.float()) * self.shared.weight.sum()
        return self.norm(x).mean((2, 3))


def test_only_weights_that_autocast_always_casts_are_cast(images):
    model = Mixed().eval()
    with build("grad-cam", model, layer="norm") as method:
        method.halve(images(1, 8), torch.bfloat16)
        explain(method, images(2, 8), torch.tensor([0, 1]))
    halves = {name for name, value in model.named_parameters(remove_duplicate=False) if value.dtype != torch.float32}
    assert halves == {"shared.bias", "twice.weight", "twice.bias", "again.weight", "again.bias"}
    assert model.twice.weight is model.again.weight
    with full_weights(model):
        assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert model.twice.weight.dtype == torch.bfloat16
    assert full_of(model.twice.weight).dtype == torch.float32
