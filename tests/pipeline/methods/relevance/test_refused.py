"""What relevance cannot pass through is refused when the method is built, with the operation's name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError

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
        (lambda x: x * x.detach().sigmoid(), "mul of two tensors"),
        (lambda x: torch.mul(x, other=x), "mul of two tensors"),
        (lambda x: torch.div(1, x), "div"),
        (lambda x: x * x.sigmoid(), "operation sigmoid"),
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
    ("name", "layer", "said"),
    [
        ("vit_b_16", None, "multi_head_attention_forward"),
        ("swin_t", "features.3", "layer_norm"),
        ("convnext_tiny", None, "layer_norm"),
        ("efficientnet_b0", "features.5", "sigmoid"),
    ],
)
def test_networks_with_attention_or_gates_are_refused(name, layer, said, network):
    with pytest.raises(UserError, match=f"no rule for the operation {said} in "):
        build("relevance-cam", network(name), layer=layer)


@pytest.mark.parametrize("name", ["efficientnet_b0", "swin_t"])
def test_layers_after_the_last_gate_are_explained(name, network, images):
    found = build("relevance-cam", network(name))(images(2, 64), TARGET)
    assert found.isfinite().all()
    assert found.std() > 0


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
