"""What relevance cannot pass through is refused when the method is built, with the operation's name."""

import copy

import pytest
import torch
from small_transformers import small
from torch import nn
from torch.nn import functional as F

from saltern.pipeline.methods import build
from saltern.pipeline.models.passes import frozen
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
TARGET = torch.tensor([7, 500])


class Gate(nn.Module):
    """x times a gate, by a function that a user wrote."""

    def __init__(self, gate) -> None:
        super().__init__()
        self.gate, self.conv, self.fc = gate, nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.gate(self.conv(x)).mean((2, 3)))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (lambda x: x.mul_(x.relu()), "mul_ of two tensors"),
        (lambda x: x - x.mean((2, 3), keepdim=True), "sub of two tensors"),
        (lambda x: torch.div(1, x), "div"),
        (lambda x: x / x.exp(), "div.* of two tensors"),
        (lambda x: x.sigmoid(), "operation sigmoid outside of a product"),
        (lambda x: x + x.sigmoid(), "operation sigmoid outside of a product"),
        (lambda x: x.flatten(2).softmax(-1).view_as(x).relu(), "operation softmax outside of a product"),
        (lambda x: x * (2 * x.sigmoid().mean((2, 3), keepdim=True)).exp(), "operation exp"),
        (lambda x: x * x.exp(), "operation exp"),
        (lambda x: F.interpolate(x, scale_factor=2), "operation interpolate"),
        (lambda x: torch.add(x, x, alpha=2), "alpha"),
        (lambda x: F.conv2d(x, x.mean((0, 2, 3))[:, None, None, None], groups=4), "depend on the image"),
        (Hidden.apply, "operation Hidden"),
    ],
)
def test_what_has_no_rule_is_refused_when_the_method_is_built(gate, said):
    with pytest.raises(UserError, match=f"relevance-cam has no rule for .*{said}.* in Gate; .*grad-cam"):
        build("relevance-cam", Gate(gate), layer="conv")
    build("relevance-cam", Gate(lambda x: torch.mul(input=x, other=2)), layer="conv")


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: x * x.sigmoid(),
        lambda x: x.mul(1 - F.hardsigmoid(x)),
        lambda x: x * (2 * x.mean((2, 3), keepdim=True).sigmoid()),
        lambda x: x / x.norm(dim=1, keepdim=True),
        lambda x: F.normalize(x, dim=1),
        lambda x: x * (x.exp().sigmoid() + 1),
    ],
)
def test_a_gate_is_a_constant_whatever_it_is_made_of(gate, images):
    torch.manual_seed(0)
    model, x = Gate(gate).double(), images(2, 8).double()
    with torch.no_grad():
        value = model.conv(x)
        factor = gate(value) / value
    fixed = copy.deepcopy(model)
    fixed.gate = lambda x: x * factor
    for method, options in (("lrp", {"composite": "epsilon"}), ("relevance-cam", {"layer": "conv"})):
        torch.testing.assert_close(build(method, model, **options)(x), build(method, fixed, **options)(x))


def test_the_mean_over_tokens_is_a_pool(images):
    torch.manual_seed(0)
    model, x = Gate(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1)[..., None]).double(), images(2, 8).double()
    found = build("lrp", model)(x)
    model.gate = lambda x: x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(found, build("lrp", model)(x))


class Times(nn.Module):
    """The image times itself, moved by a pixel."""

    def forward(self, x):
        return x * x.roll(1, -1)


class Top(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_factors_that_both_carry_relevance_take_half_each(images):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Tanh(), Times(), Top()).double(), images(2, 8).double()
    method = build("relevance-cam", model, layer=["0", "1"])
    with frozen(model):
        logits, outputs = method._forward(x)
        ((R_factors, R_product),) = method._propagation.relevance(logits, outputs, [torch.ones_like(logits)])
    torch.testing.assert_close(R_factors, R_product / 2 + (R_product / 2).roll(-1, -1))


@pytest.mark.parametrize("name", ["swin_v2", "efficientnet", "maxvit"])
def test_the_operations_of_queries_and_gates_need_no_rule(name, images):
    # Normalised queries, scores, exponents and masks get no relevance, so they are not refused.
    model = small(name)
    build("lrp", model)(images(1, 64).double())


@pytest.mark.parametrize("name", ["timm_vit", "swin"])
def test_an_operation_that_is_reached_is_named_before_work_starts(name):
    model = small(name)
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda module, args, output: output.cos())
    for method in ("lrp", "clrp", "sglrp"):
        with pytest.raises(UserError, match=f"^{method} has no rule for the operation cos in .*; use gradient"):
            build(method, model)
    layer = {"timm_vit": "blocks.0", "swin": "features.1"}[name]
    with pytest.raises(
        UserError, match=r"^relevance-cam has no rule for the operation cos in .*; choose a layer after"
    ):
        build("relevance-cam", model, layer=layer)


def test_compiled_models_and_layers_that_do_not_reach_the_logits_are_refused(tiny):
    with pytest.raises(UserError, match="compiled"):
        build("relevance-cam", torch.compile(tiny), layer="_orig_mod.stage2")
    with pytest.raises(UserError, match="does not run"):
        build("relevance-cam", tiny, layer="unused")


class Late(nn.Module):
    """The branch is there, and the logits do not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        self.idle(x)
        return self.fc(self.used(x).mean((2, 3)))


def test_a_layer_that_the_logits_do_not_depend_on_is_refused(images):
    with pytest.raises(UserError, match="do not depend on layer 'idle'"):
        build("relevance-cam", Late(), layer="idle")(images(1, 8))
