"""Taps, decoder, and a classifier restricted to some classes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from thin import thin
from torch import nn
from torchvision import models

from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.masknet.network import Decoder, Trunk, enlarge
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.models.classifiers import load
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
STAGES = {
    "resnet18": (("maxpool", "layer1", "layer2", "layer3", "layer4"), (64, 64, 128, 256, 512)),
    "regnet_x_400mf": (
        ("trunk_output.block1", *(f"trunk_output.block{n}" for n in (1, 2, 3, 4))),
        (32, 32, 64, 160, 400),
    ),
    "mobilenet_v2": (tuple(f"features.{n}" for n in (2, 3, 6, 13, 18)), (24, 24, 32, 96, 1280)),
    "efficientnet_b0": (tuple(f"features.{n}" for n in (2, 2, 3, 5, 8)), (24, 24, 40, 112, 1280)),
    "efficientnet_lite0": (tuple(f"_blocks.{n}" for n in (1, 2, 4, 10, 15)), (24, 24, 40, 112, 320)),
    "densenet121": (
        ("features.pool0", *(f"features.denseblock{n}" for n in (1, 2, 3, 4))),
        (64, 256, 512, 1024, 1024),
    ),
    "vgg11_bn": (tuple(f"features.{n}" for n in (7, 13, 20, 27, 28)), (32, 64, 128, 128, 128)),  # a quarter
}


def network(name: str) -> nn.Module:
    """Return a network with random weights; VGG, whose head has 120 million, with a quarter of its channels."""
    return thin(name) if name == "vgg11_bn" else load(name, "none").model


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_found_and_drawn_from(name):
    model = network(name).train()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    stages = find_stages(model)
    assert (stages.names, stages.channels) == STAGES[name]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    x_BCHW = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        logits_BK, taps = Trunk(model.eval(), stages.names)(x_BCHW)
        torch.testing.assert_close(logits_BK, model(x_BCHW))
    sides = [(24, 32), (24, 32), (12, 16), (6, 8), (3, 4)]
    assert [tuple(tap.shape[1:]) for tap in taps] == [(k, *s) for k, s in zip(stages.channels, sides, strict=True)]
    mask_B1hw = Decoder(stages.channels)(taps)
    assert mask_B1hw.shape == (1, 1, 24, 32)
    assert enlarge(mask_B1hw, x_BCHW.shape[2:]).shape == (1, 1, 96, 128)


def test_published_size():
    with torch.device("meta"):
        decoder = Decoder((64, 256, 512, 1024, 2048))
    assert sum(weight.numel() for weight in decoder.parameters()) == 249_153


def test_resnet50_has_the_published_taps():
    assert find_stages(models.resnet50()).channels == (64, 256, 512, 1024, 2048)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "squeezenet1_1"])
def test_no_stages(name):
    with pytest.raises(UserError, match="no stages at strides 4, 8, 16 and 32"):
        find_stages(load(name, "none").model)


def test_stages_below_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.resnet18()

        def forward(self, x):
            return self.net(x)

    assert find_stages(Wrapper()).names == tuple(f"net.{name}" for name in STAGES["resnet18"][0])


def test_initial_weights():
    decoder = Decoder((64, 256, 512, 1024, 2048), torch.Generator().manual_seed(0))
    for conv, norm, _ in decoder.stages:
        assert conv.bias is None
        assert float(conv.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.03)
        assert torch.equal(norm.weight, torch.ones(64))
        assert torch.equal(norm.bias, torch.zeros(64))
    assert float(decoder.last.weight.detach().std()) == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    again = Decoder((64, 256, 512, 1024, 2048), torch.Generator().manual_seed(0))
    assert torch.equal(decoder.last.weight, again.last.weight)


def test_the_last_weights_begin_smaller_on_demand():
    at_0 = [torch.Generator().manual_seed(0) for _ in range(2)]
    published, scaled = (Decoder((8, 6, 6), draw, scale) for draw, scale in zip(at_0, (1.0, 0.01), strict=True))
    torch.testing.assert_close(scaled.last.weight, 0.01 * published.last.weight)
    for one, other in zip(scaled.stages.parameters(), published.stages.parameters(), strict=True):
        assert torch.equal(one, other)
    taps = [8 * torch.randn(4, 8, 8, 8), torch.randn(4, 6, 4, 4), torch.randn(4, 6, 2, 2)]
    # For taps of this scale, the published initial weights make masks that are 0 or 1 nearly everywhere.
    flat = [((mask < 0.02) | (mask > 0.98)).float().mean() for mask in (published(taps), scaled(taps))]
    assert flat[0] > 0.8
    assert flat[1] < 0.1


def test_decoder_by_hand():
    decoder = Decoder((2, 3, 4)).eval()
    taps = [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)]
    parts = [taps[0]]
    for (conv, norm, _), tap in zip(decoder.stages, taps[1:], strict=True):
        norm.running_var.fill_(4)
        y = (F.conv2d(tap, conv.weight) / (4 + 1e-5) ** 0.5).relu()
        parts.append(nn.Upsample(scale_factor=8 // y.shape[2], mode="bilinear", align_corners=False)(y))
    z = F.conv2d(torch.cat(parts, 1), decoder.last.weight, decoder.last.bias, padding=1)
    torch.testing.assert_close(decoder(taps), 1 / (1 + torch.exp(-z)))


def test_taps_carry_no_gradient_where_shared(staged):
    net = staged()
    names = find_stages(net).names
    x_BCHW = torch.randn(2, 3, 64, 64)
    logits_BK, taps = Trunk(net, names)(x_BCHW)
    assert logits_BK.requires_grad
    assert not any(tap.requires_grad for tap in taps)
    assert all(tap.requires_grad for tap in Trunk(net, names, detached=False)(x_BCHW)[1])


def test_the_classifier_runs_once(staged):
    net = staged()
    names = find_stages(net).names
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    Trunk(net, names)(torch.randn(2, 3, 64, 64))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "densenet121", "efficientnet_lite0"])
def test_restricted_head_gives_its_rows(name):
    model = network(name)
    x_BCHW = torch.randn(1, 3, 224, 224)
    classes = [7, 3, 400]
    with torch.no_grad():
        expected = model(x_BCHW)[:, classes]
        restrict(model, classes)
        torch.testing.assert_close(model(x_BCHW), expected, rtol=1e-4, atol=1e-6)
    assert find_stages(model).channels == STAGES[name][1]


def test_restriction_is_checked(staged):
    for classes, said in (([], "at least one"), ([1, 1], "given once"), ([6], "0..5"), ([-1], "0..5")):
        with pytest.raises(UserError, match=said):
            restrict(staged(), classes)
    with pytest.raises(UserError, match="no linear layer"):
        restrict(models.squeezenet1_1(), [1])
