"""Ablation-CAM's passes from the layer on: the same as whole passes, whatever the model's code does."""

import copy

import pytest
import torch
from ablation import fast, forced_whole, naive_ablation
from references import agree
from torch import nn

from saltern.pipeline.methods import build

TARGET = torch.tensor([3, 1, 3])


@pytest.mark.parametrize("layer", ["layer1.0.downsample", "layer1.0.bn1", "layer1.0.relu", "layer1.0", "layer1"])
def test_from_the_layer_on_and_whole_passes_give_the_same(layer, images):
    model = Residual().eval().double()
    x, before = images(3, 16).double(), set(vars(model))
    with build("ablation-cam", model, layer=layer) as method, forced_whole(model, layer) as whole:
        found = method(x, TARGET)
        assert fast(method)
        assert whole._tail.whole
        agree(found, whole(x, TARGET), "ablation-cam by whole passes", "small residual network")
        torch.testing.assert_close(method(x, TARGET), found)
        torch.testing.assert_close(method.last.logits_BK, model(x))
    assert set(vars(model)) == before


def test_on_resnet18_too(network, images):
    small = copy.deepcopy(network("resnet18")).double()
    x = images(3, 32).double()
    with build("ablation-cam", small, layer="layer3") as method, forced_whole(small, "layer3") as whole:
        found = method(x[:1], TARGET[:1])
        assert fast(method)
        agree(found, whole(x[:1], TARGET[:1]), "ablation-cam by whole passes", "resnet18")


class Residual(nn.Module):
    """A block whose ReLU is used twice and in place, its shortcut added in place, and a layer that gives a tuple."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
            self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.downsample = nn.Conv2d(6, 8, 1, 2)

        def forward(self, x):
            out = self.conv2(self.relu(self.bn1(self.conv1(x))))
            out += self.downsample(x)
            return self.relu(out)

    class Pair(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x), x

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.stem = nn.Conv2d(3, 6, 3, 1, 1)
            self.layer1 = nn.Sequential(self.Block())
            self.pair = self.Pair(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()))
            self.fc = nn.Linear(8, 5)

    def forward(self, x, *, flag=False, extra=None):
        n, x = x.size(0), self.layer1(self.stem(x))
        a, b = self.pair(x)
        if flag or extra is not None:
            raise AssertionError
        return self.fc((a * b.mean((2, 3), keepdim=True)).view(n, 8, -1).mean(2))


def test_a_layer_that_gives_a_tuple(images):
    model = Residual().eval().double()
    x = images(3, 16).double()
    with build("ablation-cam", model, layer="pair") as method, forced_whole(model, "pair") as whole:
        target = torch.tensor([0, 4, 2])
        agree(method(x, target), whole(x, target), "ablation-cam by whole passes", "small residual network")
        assert fast(method)


class Odd(nn.Module):
    """Models whose code depends on values, on types, or on what a module did to its input."""

    def __init__(self, kind, inner):
        super().__init__()
        self.kind, self.inner, self.relu = kind, inner, nn.ReLU(inplace=True)

    def forward(self, x):
        if self.kind == "branches" and x.mean() > -1e9:
            return self.inner(x)
        if self.kind == "types" and isinstance(x, torch.Tensor):
            x = x + 1
        if self.kind == "constant":
            x = x * torch.tensor([1.0, 0.5, 2.0])[:, None, None]
        if self.kind == "overwritten":
            x = x * 1
            self.relu(x)  # its record leaves x as it was
        if self.kind == "input":
            x *= 0.5
        logits = self.inner(x)
        if self.kind == "overwritten":
            logits = logits + x.mean((1, 2, 3))[:, None]
        if self.kind == "branches after" and logits.mean() > -1e9:
            logits = logits * 2
        return logits


@pytest.mark.parametrize("kind", ["branches", "types", "constant", "overwritten", "input", "branches after"])
def test_models_with_code_of_their_own(kind, tiny, images):
    model, x = Odd(kind, tiny), images(3, 16)
    before = set(vars(model))
    with build("ablation-cam", model, layer="inner.stage1") as method:
        expected = naive_ablation(
            model, tiny.stage1, lambda image: tiny.stage1(tiny.stem(seen(kind, image))), 1, x, TARGET
        )
        agree(method(x.clone(), TARGET), expected, f"ablation-cam by a naive loop, {kind}", "tiny")
        torch.testing.assert_close(method(x.clone(), TARGET), method(x.clone(), TARGET))
        assert method._tail.whole == (kind == "overwritten")
        assert method._tail.batched == (kind != "branches after")
        assert set(vars(model)) == before
        assert all("forward" not in vars(module) for module in model.modules())


def seen(kind, x):
    """What the inner network is given."""
    x = x + 1 if kind == "types" else x / 2 if kind == "input" else x.relu() if kind == "overwritten" else x
    return x * torch.tensor([1.0, 0.5, 2.0])[:, None, None] if kind == "constant" else x


def test_nothing_before_the_layer_runs_again(tiny, images):
    ran = dict.fromkeys(("stem", "stage1", "stage2", "fc"), 0)
    for name in ran:

        def note(module, args, output, name=name):
            ran[name] += len(output)

        module = getattr(tiny, name)
        (module if name == "fc" else module[0]).register_forward_hook(note)  # inside of what returns its record
    with build("ablation-cam", tiny, layer="stage1", chunk=6) as method:
        method(images(3, 16))  # compares vmap with a single channel
        ran.update(dict.fromkeys(ran, 0))
        method(images(3, 16))
    # The logits, the score that they are compared with, and 8 channels, two in each pass.
    assert ran == {"stem": 3, "stage1": 3, "stage2": 3 + 3 + 3 * 4, "fc": 3 + 3 + 3 * 4}


def test_ablation_under_autocast_is_as_exact_as_the_activation(tiny, images):
    # A channel's share of the logit is less than what bfloat16 keeps of it.
    x = images(3, 16)
    for method in (build("ablation-cam", tiny, layer="stage1"), forced_whole(tiny, "stage1")):
        exact = method(x, TARGET)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = method(x, TARGET)
            assert method.last.logits_BK.dtype == torch.bfloat16
        assert 0 < (rough - exact).norm() < 0.02 * exact.norm()
