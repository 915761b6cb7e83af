"""Deconvnet, guided backpropagation and guided Grad-CAM against captum, and against a graph walked node by node.

captum changes only `nn.ReLU` modules. For functional ReLUs and ReLU6 the reference is `Walk`, one image in float64.
"""

import copy
import gc
import operator
import warnings
import weakref

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from references import agree, likely
from torch import Tensor, fx, nn

from saltern.pipeline.methods import build
from saltern.pipeline.models.layers import resolve
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
RULES = ["deconvnet", "guided-backprop"]
CAPTUM = {"deconvnet": "Deconvolution", "guided-backprop": "GuidedBackprop"}
SIGNED = {"value": "signed", "reduce": "sum"}
DRAWN = torch.tensor([7, 500])


class Walk(fx.Interpreter):
    """Runs the traced network node by node, out of place, with the rule as a hook on every rectifier's signal."""

    def __init__(self, model: nn.Module, rule: str) -> None:
        super().__init__(fx.symbolic_trace(copy.deepcopy(model).double().requires_grad_(False)))
        self.rule, self.met = rule, 0

    def run_node(self, n: fx.Node) -> object:
        kind = self.module.get_submodule(n.target) if n.op == "call_module" else n.target
        if isinstance(kind, nn.ReLU) or kind in (F.relu, torch.relu, "relu"):
            return self.rectified(self.env[n.args[0]], float("inf"))
        if isinstance(kind, nn.ReLU6) or kind is F.relu6:
            return self.rectified(self.env[n.args[0]], 6.0)
        if kind is operator.iadd:
            return self.env[n.args[0]] + self.env[n.args[1]]
        return super().run_node(n)

    def rectified(self, x: Tensor, high: float) -> Tensor:
        self.met += 1
        h = x.clamp(0, high)  # masks R by 0 < x < high
        if self.rule == "deconvnet":
            h = x + (h - x).detach()  # does not
        h.register_hook(lambda R: R * (R > 0))
        return h


def walked(name_of_rule, model, x, target):
    maps = []
    for image, c in zip(x, target, strict=True):
        walk, leaf = Walk(model, name_of_rule), image[None].double().requires_grad_()
        walk.run(leaf)[0, c].backward()
        assert walk.met > 10
        maps.append(leaf.grad.sum(1))
    return torch.cat(maps)


def theirs(kind, model, x, target, *layer, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum announces its hooks
        return getattr(captum.attr, kind)(model, *layer).attribute(x.clone().requires_grad_(), target, **kwargs)


def loud(images):
    """Activations go beyond 6; small, as grouped convolutions in float64 are slow."""
    return 4 * images(2, 40)


def masked_signal(x: Tensor, R: Tensor) -> dict[str, Tensor]:
    return {"deconvnet": R * (R > 0), "guided-backprop": R * (x > 0) * (R > 0)}


@pytest.mark.parametrize("rule", RULES)
def test_rule_by_hand(rule):
    """One ReLU between two linear layers: every product written out."""
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x = torch.randn(3, 3, 2, 2, generator=draw)
    hidden = x.flatten(1) @ net[1].weight.T + net[1].bias
    target = torch.tensor([0, 3, 1])
    R = masked_signal(hidden, net[3].weight[target])[rule]
    expected = (R @ net[1].weight).view_as(x).sum(1)
    agree(build(rule, net, **SIGNED)(x, target), expected, f"{rule} by hand")


@pytest.mark.parametrize(
    ("rule", "name"),
    [*((rule, name) for rule in RULES for name in ("resnet18", "vgg16_bn")), ("guided-backprop", "resnet50")],
)
def test_against_captum(rule, name, network, images):
    model, x = network(name), images(2, 64)
    expected = theirs(CAPTUM[rule], model, x, DRAWN)
    agree(build(rule, model, **SIGNED)(x, DRAWN), expected.sum(1), f"captum {CAPTUM[rule]}", name)
    agree(build(rule, model)(x, DRAWN), expected.abs().amax(1), f"captum {CAPTUM[rule]}", name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "mobilenet_v2", "efficientnet_lite0"])
def test_against_the_graph_walked(rule, name, network, images):
    # Both in float64: signals near zero flip sides of [R > 0] in float32.
    x = loud(images).double() if name in ("mobilenet_v2", "efficientnet_lite0") else images(2, 64).double()
    model = copy.deepcopy(network(name)).double()
    agree(build(rule, model, **SIGNED)(x, DRAWN), walked(rule, model, x, DRAWN), f"{rule}, node by node", name)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_rectifiers_with_an_upper_end_reach_it(name, network, images):
    """Else the rule beyond 6 would not be tested."""
    model, above = network(name), []
    hooks = [
        module.register_forward_hook(lambda module, args, output: above.append(bool((output == 6).any())))
        for module in model.modules()
        if isinstance(module, nn.ReLU6)
    ]
    with torch.no_grad():
        model(loud(images))
    for hook in hooks:
        hook.remove()
    assert any(above)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer3"), ("vgg16_bn", "features.32"), ("resnet18", None)])
def test_guided_grad_cam_against_captum(name, layer, network, images):
    model, x = network(name), images(2, 64)
    target = likely(model, x)
    where = model.get_submodule(resolve(model, layer)[0])
    expected = theirs("GuidedGradCam", model, x, target, where, interpolate_mode="bilinear")
    with build("guided-grad-cam", model, layer=layer, **SIGNED) as method:
        agree(method(x, target), expected.sum(1), "captum GuidedGradCam", name)
    with build("guided-grad-cam", model, layer=layer) as method:
        agree(method(x, target), expected.abs().amax(1), "captum GuidedGradCam", name)


@pytest.mark.parametrize(
    ("name", "layer"), [("densenet121", None), ("googlenet", "inception4b"), ("mobilenet_v2", "features.10")]
)
def test_guided_grad_cam_is_the_product_of_the_two(name, layer, network, images):
    model, x = network(name), images(2, 96)
    target = likely(model, x)
    with build("guided-backprop", model, **SIGNED) as guided, build("grad-cam", model, layer=layer) as cam:
        large = F.interpolate(cam(x, target)[:, None], (96, 96), mode="bilinear")[:, 0]
        expected = guided(x, target) * large
    agree(
        build("guided-grad-cam", model, layer=layer, **SIGNED)(x, target), expected, "guided backprop * Grad-CAM", name
    )


class Spellings(nn.Module):
    """One ReLU and one ReLU6, each written in every way."""

    WAYS = (
        ("nn.ReLU", nn.ReLU(), nn.ReLU6()),
        ("nn, in place", nn.ReLU(inplace=True), nn.ReLU6(inplace=True)),
        ("F", F.relu, F.relu6),
        ("F, by name", lambda x: F.relu(input=x, inplace=True), lambda x: F.relu6(input=x, inplace=True)),
        ("F_", F.relu_, lambda x: F.hardtanh_(x, 0, 6)),
        ("torch", torch.relu, lambda x: F.hardtanh(x, 0.0, 6.0)),
        ("torch_", torch.relu_, lambda x: F.hardtanh(x, min_val=0, max_val=6, inplace=True)),
        ("Tensor", lambda x: x.relu(), lambda x: x.clamp(0, 6)),
        ("Tensor_", lambda x: x.relu_(), lambda x: x.clamp_(0, 6)),
        ("clamp", lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0, 6)),
        ("clamp_min", lambda x: torch.clamp_min(x, 0), lambda x: torch.clamp(x, min=0, max=6)),
        ("clamp_min_", lambda x: x.clamp_min_(0), lambda x: torch.clamp_(x, min=0, max=6)),
    )

    def __init__(self, way: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        _, self.relu, self.relu6 = self.WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.one(x))
        assert int((h < 0).sum()) == 0
        h = h + 1  # in place on what a rectifier keeps would fail in plain torch, too
        return self.three(self.relu6(9 * self.two(h)).mean((2, 3)).clamp(min=1e-6))


@pytest.mark.parametrize("rule", RULES)
def test_every_spelling_is_the_same_rectifier(rule, images):
    x, target = images(2, 12), torch.tensor([1, 3])
    expected = walked_spelling(rule, x, target)
    for way, (spelled, *_) in enumerate(Spellings.WAYS):
        net = Spellings(way)
        agree(build(rule, net, **SIGNED)(x, target), expected, f"{rule} by hand", spelled)


def walked_spelling(rule, x, target):
    net, kept = Spellings(0), {}

    def rectify(name, high):
        def run(h):
            kept[name] = h.detach()
            out = h + (h.clamp(0, high) - h).detach()
            out.register_hook(lambda R: masked_signal((kept[name] > 0) & (kept[name] < high), R)[rule])
            return out

        return run

    net.relu, net.relu6 = None, None
    del net._modules["relu"], net._modules["relu6"]
    net.relu, net.relu6 = rectify("one", float("inf")), rectify("two", 6)
    leaf = x.clone().requires_grad_()
    net(leaf).gather(1, target[:, None]).sum().backward()
    assert bool((kept["two"] > 6).any())
    return leaf.grad.sum(1)


def test_a_module_that_runs_twice_follows_the_rule_twice(images):
    class Reused(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
            self.relu = nn.ReLU(inplace=True)
            self.other = self.relu if shared else nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.other(self.two(self.relu(self.one(x)))).mean((2, 3)))

    x = images(2, 12)
    for rule in RULES:
        found = build(rule, Reused(True))(x)
        torch.testing.assert_close(found, build(rule, Reused(False))(x))
        assert not torch.allclose(found, build("gradient", Reused(True))(x), rtol=1e-2)


@pytest.mark.parametrize("rule", [*RULES, "guided-grad-cam"])
@pytest.mark.parametrize(
    ("activation", "named"),
    [
        (nn.SiLU(inplace=True), "SiLU"),
        (nn.GELU(), "GELU"),
        (nn.Hardswish(), "Hardswish"),
        (nn.LeakyReLU(inplace=True), "LeakyReLU"),
        (nn.ELU(inplace=True), "ELU"),
        (nn.PReLU(), "PReLU"),
        (nn.RReLU(), "RReLU"),
        (nn.SELU(), "SELU"),
        (nn.CELU(), "CELU"),
        (nn.Mish(), "Mish"),
        (nn.Softplus(), "Softplus"),
        (nn.Tanh(), "has none"),
        (nn.Hardtanh(), "has none"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_other_activations_are_refused_when_the_method_is_built(rule, activation, named):
    rectifier = nn.Identity() if named == "has none" else nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), rectifier, nn.Conv2d(4, 4, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(UserError, match=rf"{rule}.* {named}.*; use gradient"):
        build(rule, net, **({"layer": "2"} if rule == "guided-grad-cam" else {}))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("name", "named"), [("small_vit", "GELU"), ("mobilenet_v3_small", "Hardswish"), ("efficientnet_b0", "SiLU")]
)
def test_networks_without_rectifiers_are_refused(rule, name, named, network):
    with pytest.raises(UserError, match=named):
        build(rule, network(name))


def test_a_model_for_small_images_is_checked_on_its_first_batch(images):
    def net(activation):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 9), activation, nn.Linear(9, 3))

    assert build("guided-backprop", net(nn.ReLU()))(images(2, 8)).any()
    method = build("guided-backprop", net(nn.GELU()))
    with pytest.raises(UserError, match="GELU"):
        method(images(2, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("rule", [*RULES, "guided-grad-cam"])
def test_compiled_parts_are_refused(rule, tiny):
    tiny.stage2 = torch.jit.trace(tiny.stage2, torch.randn(1, 8, 4, 4), check_trace=False)
    with pytest.raises(UserError, match="stage2 is compiled"):
        build(rule, tiny, **({"layer": "stage1"} if rule == "guided-grad-cam" else {}))


def test_squeeze_and_excitation_with_sigmoid_is_fine(images):
    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x))
            return self.head((h * self.gate(h.mean((2, 3))).sigmoid()[..., None, None]).mean((2, 3)))

    assert build("guided-backprop", Excited())(images(2, 12)).any()


@pytest.mark.parametrize("rule", [*RULES, "guided-grad-cam"])
def test_plain_gradients_are_plain_again_afterwards(rule, network, images):
    model, x = network("resnet18"), images(2, 64)
    before = build("gradient", model)(x, DRAWN)
    with build(rule, model) as method:
        first = method(x, DRAWN)
        assert torch.equal(build("gradient", model)(x, DRAWN), before)
        assert torch.equal(method(x, DRAWN), first)
        with pytest.raises(UserError):
            method(x, torch.tensor([0, 9999]))
        torch.testing.assert_close(method(x, DRAWN), first)
    assert not torch.allclose(first, before, rtol=0.1)


@pytest.mark.parametrize("rule", [*RULES, "guided-grad-cam"])
def test_a_method_that_is_let_go_lets_go_of_its_model(rule, images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    alive = weakref.ref(net)
    gc.collect()
    gc.disable()
    try:
        method = build(rule, net, **({"layer": "0"} if rule == "guided-grad-cam" else {}))
        method(images(2, 12))
        del method, net
        assert alive() is None
    finally:
        gc.enable()


def test_guided_grad_cam_names_a_layer_that_the_logits_do_not_depend_on(images):
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aside, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 2, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.head(F.relu(self.conv(x)).mean((2, 3)))

    with build("guided-grad-cam", Aside(), layer="aside") as method, pytest.raises(UserError, match="'aside'"):
        method(images(2, 12))
