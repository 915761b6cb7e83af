"""Relevance through attention, LayerNorm, products and gates: against three independent references."""

import copy

import detached
import pytest
import torch
from naive_relevance import Naive
from references import agree
from relevance_starts import STARTS
from small_transformers import small
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon
from zennit.types import Convolution

from saltern.pipeline.methods import build
from saltern.pipeline.methods.relevance import rules
from saltern.pipeline.models.passes import frozen

pytestmark = pytest.mark.slow
TARGET = torch.tensor([1, 5])
RULES = {
    "alpha1beta0": {"convolution": "alpha1beta0", "linear": "alpha1beta0", "first": "box"},
    "epsilon": {"convolution": "epsilon", "linear": "epsilon"},
    "published": {"convolution": "published", "linear": "published"},
}
# Sides that need padded windows are among them.
NETWORKS = [
    ("vit", 32, "alpha1beta0", "constant"),
    ("vit", 32, "epsilon", "attnlrp"),
    ("swin", 56, "alpha1beta0", "constant"),
    ("swin", 64, "epsilon", "attnlrp"),
    ("swin_v2", 56, "epsilon", "constant"),
    ("timm_vit", 64, "alpha1beta0", "constant"),
    ("timm_vit", 64, "epsilon", "attnlrp"),
    ("timm_deit", 64, "alpha1beta0", "attnlrp"),
    ("timm_swin", 64, "epsilon", "constant"),
    ("maxvit", 64, "alpha1beta0", "attnlrp"),
    ("convnext", 64, "epsilon", "constant"),
    ("efficientnet", 64, "alpha1beta0", "constant"),
    ("mobilenet_v3", 64, "epsilon", "constant"),
    ("regnet", 64, "alpha1beta0", "constant"),
]


@pytest.mark.parametrize(("name", "side", "composite", "softmax"), NETWORKS)
def test_maps_equal_the_naive_ones(name, side, composite, softmax, images):
    model, x = small(name), images(2, side).double()
    found = build("lrp", model, composite=composite, softmax=softmax)(x, TARGET)
    maps = []
    for image, target in zip(x, TARGET.tolist(), strict=True):
        tape = Naive(model, image, **RULES[composite], published=False, merge=True, softmax=softmax)
        maps.append(tape.run(STARTS["logit"](tape.logits[0], target)).pixels())
    agree(found, torch.stack(maps), f"naive lrp, {composite}, softmax={softmax}", name, rtol=1e-6)


def patches_4x4(A_BTK):
    return A_BTK[:, -16:].mT.unflatten(-1, (4, 4))


def channels_first(A_BhwK):
    return A_BhwK.movedim(-1, 1)


CAMS = [
    ("vit", "encoder.layers.encoder_layer_0", "constant", patches_4x4),
    ("vit", "encoder.layers.encoder_layer_1.ln_1", "attnlrp", patches_4x4),
    ("timm_vit", "blocks.1.norm1", "constant", patches_4x4),
    ("swin", "features.1", "constant", channels_first),
    ("swin", "features.3", "attnlrp", channels_first),
    ("maxvit", "blocks.0", "constant", lambda A: A),
    ("regnet", "trunk_output.block2", "constant", lambda A: A),
]


@pytest.mark.parametrize(("name", "layer", "softmax", "grid"), CAMS)
def test_relevance_cam_equals_the_naive_one(name, layer, softmax, grid, images):
    model = small(name)
    x = images(2, model.image_size).double()
    found = build("relevance-cam", model, layer=layer, softmax=softmax)(x, TARGET)
    maps = []
    for image, target in zip(x, TARGET.tolist(), strict=True):
        tape = Naive(model, image, **RULES["published"], layers=[layer], softmax=softmax)
        maps.append(tape.run(STARTS["unit"](tape.logits[0], target)).map(layer, grid))
    agree(found, torch.stack(maps), f"naive Relevance-CAM, softmax={softmax}", name)


HAND = [(name, softmax) for name in ("vit", "swin") for softmax in ("constant", "attnlrp")]


@pytest.fixture
def exact(monkeypatch):
    """Make the shift of denominators negligible, for identities without it."""
    monkeypatch.setattr(rules, "_SHIFT", 1e-14)


@pytest.mark.parametrize(("name", "softmax"), HAND)
def test_epsilon_is_input_times_gradient_of_a_detached_network(name, softmax, exact, images):
    model = small(name)
    x = images(2, model.image_size).double().requires_grad_()
    logits = getattr(detached, name)(model, x, softmax)
    torch.testing.assert_close(logits, model(x))
    (gradient,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), x)
    expected = (x * gradient).sum(1)
    found = build("lrp", model, composite="epsilon", softmax=softmax)(x.detach(), TARGET)
    agree(found, expected, f"input x gradient, detached, softmax={softmax}", name, rtol=1e-5)


def absorbed(model, x, name):
    """Relevance that biases, positions and extra tokens take: each times its gradient, for one image."""
    kinds = ("bias", "class_token", "pos_embedding")
    taken = [value for key, value in model.named_parameters() if key.endswith(kinds)]
    logits = getattr(detached, name)(model, x, "constant")
    gradients = torch.autograd.grad(logits[0, TARGET[0]], taken)
    return sum((value * gradient).sum().item() for value, gradient in zip(taken, gradients, strict=True))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_what_pixels_lack_of_the_logit_is_taken_by_biases_and_positions(name, exact, images):
    model = small(name)
    x = images(1, model.image_size).double()
    with build("lrp", model, composite="epsilon") as method:
        total, logit = method(x, TARGET[:1]).double().sum(), method.last.logits_BK[0, TARGET[0]]
    lost = absorbed(model, x, name)
    assert abs(lost) > 0.1 * abs(float(logit))
    torch.testing.assert_close(total + lost, logit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("composite", ["alpha1beta0", "epsilon", "gamma"])
@pytest.mark.parametrize("name", ["vit", "swin", "timm_vit", "convnext"])
def test_relevance_is_conserved_without_biases(name, composite, images):
    model = small(name, biases=False)
    x = images(2, model.image_size).double()
    with build("lrp", model, composite=composite) as method:
        total = method(x, TARGET).double().sum((1, 2))
        logit = method.last.logits_BK.gather(1, TARGET[:, None])[:, 0]
    # Denominators are shifted by 1e-6, which takes its share.
    torch.testing.assert_close(total, logit, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit", ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]),
        ("swin", ["features.0", "features.1", "features.3"]),
        ("timm_deit", ["blocks.0", "blocks.1"]),
    ],
)
def test_relevance_at_every_layer_sums_to_the_initial(name, layers, images):
    model = small(name)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # of all biases, those of LayerNorm alone take relevance here
            nn.init.zeros_(module.bias)
    x = images(2, model.image_size).double()
    method = build("relevance-cam", model, layer=layers)
    with frozen(model):
        logits, outputs = method._forward(x)
        start = torch.full((2, 10), -0.1, dtype=torch.float64).scatter(1, TARGET[:, None], 1.0)
        (relevance,) = method._propagation.relevance(logits, outputs, [start])
    for R in relevance:
        # Of 16 inputs of a linear layer, now and then none contributes positively, and its output's share is lost.
        torch.testing.assert_close(R.flatten(1).sum(1), torch.full((2,), 0.1, dtype=torch.float64), rtol=2e-3, atol=0)


class Mixer(nn.Module):
    """Patches, LayerNorm and one head of attention; 3 classes."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)
        self.value, self.fc = nn.Linear(6, 6), nn.Linear(24, 3)

    def forward(self, x):
        x = self.norm(self.patch(x).flatten(2).mT)
        return self.fc(((x @ x.mT).softmax(-1) @ self.value(x)).flatten(1))


class Frozen(nn.Module):
    """The Mixer of one image, whose LayerNorms and attention are linear layers, which zennit knows."""

    def __init__(self, net, x):
        super().__init__()
        self.net, tokens = net, net.patch(x).flatten(2).mT[0]
        std = (tokens.var(1, correction=0) + net.norm.eps).sqrt()
        self.norms = nn.ModuleList(nn.Linear(6, 6) for _ in std).double()
        for layer, sigma in zip(self.norms, std, strict=True):
            layer.weight.data = (net.norm.weight / sigma)[:, None] * (torch.eye(6) - 1 / 6)
            layer.bias.data = net.norm.bias.data
        y = net.norm(tokens)
        self.mix = nn.Linear(4, 4, bias=False)
        self.mix.weight.data = (y @ y.T).softmax(-1)

    def forward(self, x):
        parts = self.net.patch(x).flatten(2).mT.unbind(1)
        tokens = torch.stack([layer(part) for layer, part in zip(self.norms, parts, strict=True)], 1)
        return self.net.fc(self.mix(self.net.value(tokens).mT).mT.flatten(1))


def test_layer_norm_and_attention_equal_zennits_epsilon_on_linear_layers(images):
    torch.manual_seed(0)
    net = Mixer().double()
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    nn.init.normal_(net.norm.bias)
    for seed in range(3):
        x = images(3, 8)[seed : seed + 1].double()
        other = Frozen(net, x)
        torch.testing.assert_close(other(x), net(x))
        composite = LayerMapComposite([((Convolution, nn.Linear), Epsilon())])
        target = torch.tensor([seed])
        start = lambda logits: torch.zeros_like(logits).scatter(1, target[:, None], logits.detach()[:, target])  # noqa: B023, E731
        with Gradient(other, composite, attr_output=start) as attributor:
            _, expected = attributor(x.clone().requires_grad_())
        found = build("lrp", net, composite="epsilon")(x, target)
        agree(found, expected.sum(1), "zennit, epsilon", "mixer of patches", rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"softmax": "attnlrp"}])
@pytest.mark.parametrize("name", ["vit", "swin", "regnet"])
def test_a_batch_equals_single_runs_and_top_classes_share_a_forward(name, options, images):
    model = small(name)
    x = images(3, model.image_size).double()
    method = build("clrp", model, composite="gamma", **options)
    together = method(x)
    for index in range(3):
        agree(method(x[index : index + 1]), together[index : index + 1], "single runs", name, rtol=1e-6)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    several = method.explain(x, number=3)
    handle.remove()
    assert len(calls) == 1
    ranked = model(x).topk(3, 1).indices
    for index, (maps, _) in enumerate(several):
        agree(maps, method(x, ranked[:, index]), "one class at a time", name, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "rtol", "options"),
    [
        ("vit", 0.1, {}),
        ("vit", 0.1, {"composite": "epsilon", "softmax": "attnlrp"}),
        ("timm_vit", 0.1, {"softmax": "attnlrp"}),
        ("swin", 0.1, {"composite": "epsilon"}),
        ("swin", 0.3, {}),  # its LayerNorm of patches with 16 channels divides by little
        ("timm_swin", 0.2, {"composite": "epsilon", "softmax": "attnlrp"}),
        ("convnext", 0.1, {"composite": "epsilon"}),
        ("efficientnet", 0.1, {}),
    ],
)
def test_half_precision_gives_nearly_the_same_and_leaves_the_model_alone(name, rtol, options, images):
    model = small(name).float()
    x = images(2, model.image_size)
    top_B = model(x).argmax(1)  # a logit near zero has no digits in 16 bits
    expected = build("lrp", model, **options)(x, top_B)
    half = copy.deepcopy(model).to(torch.bfloat16)
    before = copy.deepcopy(half.state_dict())
    agree(build("lrp", half, **options)(x.bfloat16(), top_B), expected, "float32", f"{name}, bfloat16", rtol=rtol)
    with torch.autocast("cpu", torch.bfloat16):
        agree(build("lrp", model, **options)(x, top_B), expected, "float32", f"{name}, autocast", rtol=rtol)
    assert all(torch.equal(value, before[key]) for key, value in half.state_dict().items())
    assert not any(hasattr(value, "_relevance_mark") for value in (*half.parameters(), *half.buffers()))
