"""SmoothGrad, integrated gradients, input times gradient, and the noise, each against a reference."""

import copy
import math

import captum.attr
import numpy as np
import pytest
import torch
from references import agree
from torch import nn

from saltern.pipeline.bench.figures import peak_bytes
from saltern.pipeline.methods import build
from saltern.pipeline.methods.gradients.noise import gaussian, uniform
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
DRAWN = torch.tensor([7, 500])
SIGNED = {"value": "signed", "reduce": "sum"}
NAMES = ["resnet18", "densenet121", "googlenet", "mobilenet_v2", "efficientnet_lite0"]


def gradient_of(model, image_CHW, target):
    leaf = image_CHW[None].clone().requires_grad_()
    model(leaf)[0, int(target)].backward()
    return leaf.grad[0]


# --- input times gradient


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "small_swin"])
def test_input_x_gradient_against_captum(name, network, images):
    model, x = network(name), images(2, 64)
    expected = captum.attr.InputXGradient(model).attribute(x.clone().requires_grad_(), DRAWN).detach()
    agree(build("input-x-gradient", model)(x, DRAWN), expected.sum(1), "captum InputXGradient", name)
    found = build("input-x-gradient", model, value="abs", reduce="max")(x, DRAWN)
    agree(found, expected.abs().amax(1), "captum InputXGradient", name)


# --- integrated gradients


@pytest.mark.parametrize("name", [*NAMES, "vgg16_bn", "small_swin"])
def test_integrated_gradients_against_captum(name, network, images):
    # Both in float64: signals near zero flip sides of a ReLU in float32.
    model, x = copy.deepcopy(network(name)).double(), images(2, 40).double()
    expected = captum.attr.IntegratedGradients(model).attribute(x, 0.2, DRAWN, n_steps=5).detach()
    with build("integrated-gradients", model, steps=5, baseline=0.2, chunk=6) as method:
        agree(method(x, DRAWN), expected.sum(1), "captum IntegratedGradients", name)
    with build("integrated-gradients", model, steps=5, baseline=0.2, reduce="l2") as method:
        agree(method(x, DRAWN), expected.square().sum(1).sqrt(), "captum IntegratedGradients", name)


def test_integrated_gradients_of_a_transformer(network, images):
    model, x = network("small_vit"), images(1, 64)
    expected = captum.attr.IntegratedGradients(model).attribute(x, target=7, n_steps=2).detach()
    found = build("integrated-gradients", model, steps=2)(x, DRAWN[:1])
    agree(found, expected.sum(1), "captum IntegratedGradients", "small_vit")


@pytest.mark.parametrize("baseline", [0.0, -0.7])
def test_integrated_gradients_are_complete(baseline, tiny, images):
    """The map adds up to the difference of the logits."""
    model, x, target = tiny.double(), images(4, 16).double(), torch.tensor([0, 1, 2, 4])
    found = build("integrated-gradients", model, steps=200, baseline=baseline)(x, target)
    with torch.no_grad():
        expected_B = (model(x) - model(torch.full_like(x, baseline)))[range(4), target].float()
    # The integrand jumps where a ReLU opens: the quadrature's error falls with the steps, no faster.
    torch.testing.assert_close(found.sum((1, 2)), expected_B, rtol=0, atol=5e-3 * float(expected_B.abs().max()))


def test_integrated_gradients_are_exactly_complete_on_a_smooth_model(images):
    """A polynomial of degree 3: two points integrate its derivative exactly."""

    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 64, 4)

        def forward(self, x):
            return self.head(x.flatten(1)) ** 3

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Cubic().double()
    x, target = images(3, 8).double(), torch.tensor([0, 1, 3])
    found = build("integrated-gradients", model, steps=2, baseline=0.1)(x, target)
    with torch.no_grad():
        expected_B = (model(x) - model(torch.full_like(x, 0.1)))[range(3), target].float()
    torch.testing.assert_close(found.sum((1, 2)), expected_B, rtol=1e-5, atol=1e-6)


# --- SmoothGrad


@pytest.mark.parametrize("name", NAMES)
def test_smoothgrad_against_one_point_after_the_other(name, network, images):
    model, x, seed_B = copy.deepcopy(network(name)).double(), images(2, 40).double(), torch.tensor([5, 2**31 + 7])
    options = {"samples": 5, "noise": 0.1, "chunk": 6}
    means = []
    for b in range(2):
        sigma = 0.1 * (x[b].max() - x[b].min())
        total = torch.zeros_like(x[b])
        for s in range(5):
            noise = gaussian(seed_B[b : b + 1], range(s, s + 1), x[b].numel()).view_as(x[b]).double()
            total += gradient_of(model, (x[b] + sigma * noise).float().double(), DRAWN[b])
        means.append(total / 5)
    mean = torch.stack(means)
    agree(build("smoothgrad", model, **options)(x, DRAWN, seed_B), mean.abs().amax(1), "SmoothGrad, naive", name)
    found = build("smoothgrad", model, **options, **SIGNED)(x, DRAWN, seed_B)
    agree(found, mean.sum(1), "SmoothGrad, naive", name)


def test_smoothgrad_without_noise_is_the_gradient(network, images):
    model, x = copy.deepcopy(network("small_swin")).double(), images(2, 64).double()
    found = build("smoothgrad", model, samples=3, noise=0)(x, DRAWN)
    agree(found, build("gradient", model)(x, DRAWN), "gradient", "small_swin")


def test_smoothgrad_of_a_linear_model_is_its_weight(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    found = build("smoothgrad", model, samples=7, **SIGNED)(images(2, 8), torch.tensor([1, 2]))
    torch.testing.assert_close(found, model[1].weight.detach()[[1, 2]].view(2, 3, 8, 8).sum(1))


# --- what all share


@pytest.mark.parametrize("name", ["smoothgrad", "integrated-gradients"])
def test_the_target_is_the_clean_images(name, tiny, images):
    tiny.double()  # in float32 the rounding of another layout may flip a ReLU
    x = images(4, 16).double()
    with build(name, tiny) as method:
        found = method(x)
        torch.testing.assert_close(method.last.logits_BK, tiny(x).detach())
        assert method.last.target_B.tolist() == tiny(x).argmax(1).tolist()
        torch.testing.assert_close(found, method(x, tiny(x).argmax(1)))
        laid_out = method(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(laid_out, found, rtol=1e-4, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize("name", ["smoothgrad", "integrated-gradients"])
def test_chunks_change_nothing_but_rounding(name, tiny, images):
    tiny.double()
    x, count = images(3, 16).double(), {"smoothgrad": "samples", "integrated-gradients": "steps"}[name]
    expected = build(name, tiny, **{count: 7})(x)
    for chunk in (1, 6, 7, 1000):
        torch.testing.assert_close(build(name, tiny, chunk=chunk, **{count: 7})(x), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smoothgrad", {"samples": 0}),
        ("smoothgrad", {"noise": -0.1}),
        ("smoothgrad", {"chunk": 0}),
        ("integrated-gradients", {"steps": 0}),
        ("integrated-gradients", {"chunk": 0}),
    ],
)
def test_options_are_checked(name, options, tiny):
    with pytest.raises(UserError, match=f"option {next(iter(options))} of {name}"):
        build(name, tiny, **options)


@pytest.mark.parametrize(("name", "count"), [("smoothgrad", "samples"), ("integrated-gradients", "steps")])
def test_memory_does_not_grow_with_the_points(name, count, network, images):
    model, x = network("resnet18"), images(2, 64)

    def peak(points):
        method = build(name, model, chunk=8, **{count: points})
        return peak_bytes(lambda: method(x, DRAWN))

    assert peak(24) <= 1.1 * peak(8)


# --- the noise


def test_noise_is_standard_normal():
    noise_SBN = gaussian(torch.arange(50), range(20), 1001)
    count = noise_SBN.numel()
    assert noise_SBN.shape == (20, 50, 1001)
    assert noise_SBN.dtype == torch.float32
    assert abs(float(noise_SBN.double().mean())) < 4 / count**0.5
    assert abs(float(noise_SBN.double().var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(noise_SBN.double().pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    for edge in (-2, -1, 0, 1, 2):  # and its distribution, not its moments alone
        expected = (1 + math.erf(edge / 2**0.5)) / 2
        assert abs(float((noise_SBN <= edge).double().mean()) - expected) < 4 * 0.5 / count**0.5


def test_noise_is_independent_across_seeds_draws_elements_and_channels():
    noise = gaussian(torch.arange(20), range(20), 3 * 400).double().view(20, 20, 3, 400)
    pairs = {
        "seeds": (noise[:, :-1], noise[:, 1:]),
        "draws": (noise[:-1], noise[1:]),
        "draw against seed": (noise[:-1, 1:], noise[1:, :-1]),
        "elements": (noise[..., :-1], noise[..., 1:]),
        "channels": (noise[:, :, :-1], noise[:, :, 1:]),
        "halves": (noise.flatten(2)[..., :600], noise.flatten(2)[..., 600:]),
    }
    for what, (one, other) in pairs.items():
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5, what
        assert abs(float(((one**2 - 1) * (other**2 - 1)).mean())) < 4 * 2 / one.numel() ** 0.5, what


def test_noise_is_splitmix64_and_box_muller():
    """In Python's integers, value by value."""
    golden, whole = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & whole
        return z ^ (z >> 31)

    assert mix(golden) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0, as published
    seeds, elements = [0, 1, 2**32 - 1, -3], 7
    found = gaussian(torch.tensor(seeds), range(3, 5), elements)
    for s, draw in enumerate((3, 4)):
        for b, seed in enumerate(seeds):
            stream = mix((mix(seed * golden & whole) + draw * golden) & whole)
            for i in range(elements):
                bits = mix((stream + (i % 4 + 1) * golden) & whole)
                radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
                angle = 2 * math.pi * (bits & 0xFFFFFFFF) / 2**32
                expected = radius * (math.cos(angle) if i < 4 else math.sin(angle))
                assert float(found[s, b, i]) == pytest.approx(expected, abs=2e-6)
    flat = uniform(torch.tensor(seeds), elements)
    for b, seed in enumerate(seeds):
        for i in range(elements):
            bits = mix((mix(seed * golden & whole) + (i + 1) * golden) & whole)
            assert float(flat[b, i]) == (bits >> 40) / 2**24


def test_noise_of_a_sample_does_not_depend_on_its_batch_or_group():
    seed_B = torch.tensor([3, 99, 2**40])
    together = gaussian(seed_B, range(8), 300)
    assert torch.equal(together[2:5, 1:2], gaussian(seed_B[1:2], range(2, 5), 300))
    assert not torch.equal(together[0], together[1])
    assert len(np.unique(together.numpy())) > 0.99 * together.numel()


def test_maps_follow_the_seed_and_nothing_else(tiny, images):
    x, seed_B = images(4, 16), torch.tensor([1, 2, 3, 4])
    with build("smoothgrad", tiny, samples=4) as method:
        torch.manual_seed(0)
        found = method(x, None, seed_B)
        torch.manual_seed(1)
        assert torch.equal(method(x, None, seed_B), found)
        turned = method(x.flip(0), None, seed_B.flip(0)).flip(0)
        torch.testing.assert_close(turned, found, rtol=1e-4, atol=1e-5 * float(found.max()))
        single = torch.cat([method(x[i : i + 1], None, seed_B[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(single, found, rtol=1e-4, atol=1e-5 * float(found.max()))
        other = method(x, None, torch.tensor([1, 2, 3, 5]))
        torch.testing.assert_close(other[:3], found[:3])
        assert not torch.allclose(other[3], found[3], rtol=1e-2)
        assert torch.equal(method(x), method(x, None, torch.zeros(4, dtype=torch.int64)))
        assert method.seed_B.tolist() == [0, 0, 0, 0]
        with pytest.raises(UserError, match="seeds must be int64, one a sample"):
            method(x, None, torch.tensor([1, 2]))
    assert not hasattr(method, "seed_B")
