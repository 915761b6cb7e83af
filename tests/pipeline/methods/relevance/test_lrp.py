"""LRP, CLRP and SGLRP to the pixels, against zennit's composites and a naive float64 re-implementation."""

import copy

import pytest
import torch
from naive_relevance import Naive
from references import agree
from relevance_starts import STARTS
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
from zennit.attribution import Gradient
from zennit.canonizers import AttributeCanonizer, SequentialMergeBatchNorm
from zennit.composites import (
    EpsilonGammaBox,
    EpsilonPlus,
    LayerMapComposite,
    SpecialFirstLayerMapComposite,
    layer_map_base,
)
from zennit.layer import Sum
from zennit.rules import AlphaBeta, Epsilon, Gamma, ZBox
from zennit.torchvision import ResNetBasicBlockCanonizer, ResNetBottleneckCanonizer
from zennit.types import Convolution

from saltern.pipeline.methods import build

pytestmark = pytest.mark.slow
TARGET = torch.tensor([7, 500])
COMPOSITES = ["alpha1beta0", "epsilon", "gamma", "epsilon-plus", "epsilon-gamma-box"]


def mobilenet_attributes(name, module):
    """zennit sees modules only: a Sum for the residual, a module for the functional pooling."""
    if isinstance(module, InvertedResidual) and module.use_res_connect:

        def forward(x):
            return module.canonizer_sum(torch.stack([x, module.conv(x)], -1))

        return {"forward": forward, "canonizer_sum": Sum()}
    if isinstance(module, MobileNetV2):

        def forward(x):
            return module.classifier(module.canonizer_pool(module.features(x)).flatten(1))

        return {"forward": forward, "canonizer_pool": nn.AdaptiveAvgPool2d(1)}
    return None


class ExactMerge(SequentialMergeBatchNorm):
    """zennit leaves eps in the merged BatchNorm, which so divides by sqrt(1 + eps): 1e-4 over a network."""

    def register(self, linears, batch_norm):
        super().register(linears, batch_norm)
        self.eps, batch_norm.eps = batch_norm.eps, 0.0

    def remove(self):
        super().remove()
        self.batch_norm.eps = self.eps


def canonizers_of(name):
    if name == "mobilenet_v2":
        return [ExactMerge(), AttributeCanonizer(mobilenet_attributes)]
    return [ExactMerge(), ResNetBottleneckCanonizer(), ResNetBasicBlockCanonizer()]


def zennits(name, x, canonizers):
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    same = {"alpha1beta0": AlphaBeta(1, 0), "epsilon": Epsilon(), "gamma": Gamma()}
    if name == "epsilon-plus":
        return EpsilonPlus(canonizers=canonizers)
    if name == "epsilon-gamma-box":
        return EpsilonGammaBox(low, high, canonizers=canonizers)
    layers = [*layer_map_base(), ((Convolution, nn.Linear), same[name])]
    if name == "alpha1beta0":
        return SpecialFirstLayerMapComposite(layers, [((Convolution,), ZBox(low, high))], canonizers=canonizers)
    return LayerMapComposite(layers, canonizers=canonizers)


def start_of(kind):
    def start(logits):
        pairs = zip(logits.detach(), TARGET.tolist(), strict=True)
        return torch.stack([STARTS[kind](logits_K, target) for logits_K, target in pairs])

    return start


def reference(model, name, composite, x, start="logit", merge=True):
    canonizers = canonizers_of(name) if merge else []
    with Gradient(model, zennits(composite, x, canonizers), attr_output=start_of(start)) as attributor:
        _, relevance = attributor(x.clone().requires_grad_())
    return relevance.sum(1)


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        *((name, composite) for name in ("resnet18", "mobilenet_v2") for composite in COMPOSITES),
        *((name, composite) for name in ("resnet50", "vgg16_bn") for composite in ("alpha1beta0", "epsilon-gamma-box")),
    ],
)
def test_lrp_equals_zennit(name, composite, double, images):
    model, x = double(name), images(2, 32 if name == "vgg16_bn" else 64).double()
    found = build("lrp", model, composite=composite)(x, TARGET)
    agree(found, reference(model, name, composite, x), f"zennit, {composite}", name)


def test_batch_norm_that_passes_relevance_equals_zennit_without_canonizer(double, images):
    model, x = double("vgg16_bn"), images(2, 32).double()
    found = build("lrp", model, bn="identity")(x, TARGET)
    agree(found, reference(model, "vgg16_bn", "alpha1beta0", x, merge=False), "zennit, bn=identity", "vgg16_bn")


@pytest.mark.parametrize(
    ("method", "options", "start"), [("clrp", {}, "unit"), ("clrp", {"init": "paper"}, "paper"), ("sglrp", {}, "sglrp")]
)
def test_contrastive_starts_equal_zennit_with_the_same_start(method, options, start, double, images):
    model, x = double("resnet18"), images(2, 64).double()
    found = build(method, model, **options)(x, TARGET)
    agree(found, reference(model, "resnet18", "alpha1beta0", x, start), f"zennit, {method} {start}", "resnet18")


RULES = {
    "alpha1beta0": {"convolution": "alpha1beta0", "linear": "alpha1beta0", "first": "box"},
    "epsilon-plus": {"convolution": "alpha1beta0", "linear": "epsilon"},
}


@pytest.mark.parametrize(
    ("name", "method", "composite", "options", "start"),
    [
        ("densenet121", "lrp", "alpha1beta0", {}, "logit"),
        ("googlenet", "lrp", "alpha1beta0", {}, "logit"),
        ("efficientnet_lite0", "lrp", "epsilon-plus", {}, "logit"),
        ("resnet18", "clrp", "alpha1beta0", {"init": "unit"}, "unit"),
        ("resnet18", "clrp", "alpha1beta0", {"init": "paper"}, "paper"),
        ("resnet18", "sglrp", "alpha1beta0", {}, "sglrp"),
    ],
)
def test_networks_without_canonizers_equal_the_naive_ones(name, method, composite, options, start, double, images):
    model, x = double(name), images(2, 64).double()
    found = build(method, model, composite=composite, **options)(x, TARGET)
    maps = []
    for image, target in zip(x, TARGET.tolist(), strict=True):
        tape = Naive(model, image, **RULES[composite], published=False, merge=True)
        maps.append(tape.run(STARTS[start](tape.logits[0], target)).pixels())
    agree(found, torch.stack(maps), f"naive {method}, {start}", name)


class Plain(nn.Module):
    """No bias anywhere, no BatchNorm; 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.fc = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        x = self.first(x).relu()
        x = nn.functional.max_pool2d(self.second(x).relu() + x, 2)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("composite", ["alpha1beta0", "epsilon", "epsilon-plus"])
def test_relevance_is_conserved_without_biases(composite, images):
    torch.manual_seed(0)
    model, x, target = Plain().double(), 10 * images(2, 12).double(), torch.tensor([0, 3])
    with build("lrp", model, composite=composite) as method:
        total = method(x, target).sum((1, 2)).double()
        logit = method.last.logits_BK.gather(1, target[:, None])[:, 0]
    # The shift by 1e-6 of what is divided by takes its share.
    torch.testing.assert_close(total, logit, rtol=1e-3, atol=0)


def test_normalisation_inside_the_model_belongs_to_the_image(double, images):
    class Normalised(nn.Module):
        def __init__(self, net) -> None:
            super().__init__()
            self.net = net
            self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1).double())

        def forward(self, x):
            parts = [part[:, None] / 0.25 for part in (x - self.mean).unbind(1)]
            return self.net(torch.cat(parts, 1))

    net, x = double("resnet18"), images(2, 64).double()
    model = Normalised(net).eval()
    found = build("lrp", model)(x, TARGET)
    expected = build("lrp", net)((x - model.mean) / 0.25, TARGET)
    torch.testing.assert_close(found, expected)
    in_place = build("lrp", nn.Sequential(Shift(), net))(x.clone(), TARGET)
    torch.testing.assert_close(in_place, build("lrp", net)(x - 0.5, TARGET))


class Shift(nn.Module):
    def forward(self, x):
        return x.sub_(0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_nearly_the_same(dtype, tiny, images):
    x, target = images(2, 32), torch.tensor([1, 4])
    expected = build("lrp", tiny)(x, target)
    with build("lrp", copy.deepcopy(tiny).to(dtype)) as method:
        found = method(x.to(dtype), target)
        assert method.last.logits_BK.dtype == dtype
    agree(found, expected, "float32", f"tiny, lrp in {dtype}", rtol=0.1)  # the forward pass has 8 or 11 bits
    with torch.autocast("cpu", torch.bfloat16):
        agree(build("lrp", tiny)(x, target), expected, "float32", "tiny, lrp under autocast", rtol=0.1)


def test_softmax_that_is_saturated_still_explains(tiny, images):
    tiny.fc.weight.data *= 1e4
    tiny.fc.bias.data *= 1e4
    with build("sglrp", tiny) as method:
        found = method(images(2, 16))
        assert not method.last.zero_B.any()
    assert found.isfinite().all()
