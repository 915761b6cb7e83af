"""Attention of chosen modules is seen in full, and what the model returns stays the same."""

import copy

import pytest
import torch
import vits
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from saltern.pipeline.models.attention import Heads, Weights, interception, visiting
from saltern.pipeline.models.multi_head import multi_head
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


class Calls(TorchDispatchMode):
    """Counts the operations that fuse attention."""

    def __init__(self):
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += "scaled_dot_product" in func.name() or "native_multi_head" in func.name()
        return func(*args, **(kwargs or {}))


def attending(model):
    """Return the modules in which the model attends."""
    kinds = ("Attention", "MultiheadAttention", "EvaAttention", "AttentionPoolLatent", "ViTAttention")
    kinds += ("Dinov2WithRegistersAttention",)
    return [module for module in model.modules() if type(module).__name__ in kinds]


@torch.no_grad()
@pytest.mark.parametrize("visitor", [Weights, Heads])
@pytest.mark.parametrize("family", vits.FAMILIES)
def test_the_output_stays_the_same_and_only_chosen_modules_do_without_fused_attention(family, visitor):
    model, x, seen = vits.made(family), vits.images_of(family, 2), []

    def keep(*given):
        seen.append(given[0].shape)
        return given[-1]

    with Calls() as plain:
        expected = model(x)
    modules = attending(model)
    assert plain.fused == len(modules) == 3 + bool(vits.FAMILIES[family].pool)
    for chosen in (modules, modules[1:2], []):
        seen.clear()
        with Calls() as calls, visiting(chosen, visitor(keep)):
            found = model(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert len(seen) == len(chosen)
        assert calls.fused == len(modules) - (len(chosen) if visitor is Weights else 0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", ["timm", "dinov3", "siglip"])
def test_weights_of_a_model_that_computes_them_itself(family):
    model, x = vits.made(family), vits.images(2)
    unfused = copy.deepcopy(model)
    for module in attending(unfused):
        module.fused_attn = False
    found = {}
    for key, each in (("fused", model), ("own", unfused)):
        found[key] = []

        def keep(A, kept=found[key]):
            kept.append(A)
            return A

        with torch.no_grad(), visiting(attending(each), Weights(keep)):
            each(x)
    torch.testing.assert_close(found["own"], found["fused"])
    assert all(torch.allclose(A.sum(-1), torch.ones(())) for A in found["own"])
    with (
        pytest.raises(UserError, match=r"in steps of its own.*TIMM_FUSED_ATTN=1"),
        visiting(attending(unfused), Heads(lambda q, k, v, o: o)),
    ):
        unfused(x)


def test_the_weights_that_a_visitor_returns_are_those_that_the_model_uses():
    model, x = vits.made("timm"), vits.images(1)

    def uniform(A):
        return torch.full_like(A, 1 / A.shape[-1])

    with visiting([model.blocks[2].attn], Weights(uniform)):
        changed = model(x)
    for value in model.parameters():
        assert value.requires_grad  # parameters are not touched
    assert (changed - model(x)).abs().max() > 1e-3


MASK = torch.rand(2 * 4, 5, 6, generator=torch.Generator().manual_seed(0))
MASK[:, :, 0] = 0
CASES = {
    "self": ({}, {}), "cross": ({"cross": True}, {}), "other widths": ({"cross": True, "kdim": 8, "vdim": 10}, {}),
    "no bias": ({"bias": False}, {}), "weights": ({}, {"need_weights": True}),
    "weights of heads": ({}, {"need_weights": True, "average_attn_weights": False}),
    "seq first": ({"batch_first": False}, {}),
    "mask": ({"cross": True}, {"attn_mask": MASK[0] > 0.5}), "float mask": ({"cross": True}, {"attn_mask": MASK[0]}),
    "masks of heads": ({"cross": True}, {"attn_mask": MASK > 0.5, "need_weights": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_multi_head_attention_in_steps_is_that_of_torch(case):
    options, given = CASES[case]
    options, given = dict(options), {"need_weights": False} | given
    torch.manual_seed(0)
    first, cross = options.pop("batch_first", True), options.pop("cross", False)
    module = nn.MultiheadAttention(12, 4, batch_first=first, **options).eval()
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    q = torch.randn(2, 5, 12)
    k = torch.randn(2, 6, options.get("kdim", 12)) if cross else q
    v = torch.randn(2, 6, options.get("vdim", 12)) if cross else q
    inputs = [part if first else part.transpose(0, 1) for part in ((q, k, v) if cross else (q, q, q))]
    if not cross and first:
        inputs = [inputs[0]] * 3
    expected = module(*inputs, **given)
    seen = []

    def keep(A):
        seen.append(A)
        return A

    with visiting([module], Weights(keep)):
        found = module(*inputs, **given)
    torch.testing.assert_close(found, expected)
    assert [A.shape for A in seen] == [(2, 4, 5, k.shape[1])]


@pytest.mark.parametrize("rare", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_rare_forms_of_multi_head_attention_are_refused(rare):
    module, x = nn.MultiheadAttention(12, 4, batch_first=True, **rare), torch.randn(2, 5, 12)
    with (
        pytest.raises(UserError, match=r"nn.MultiheadAttention is called with (bias_k|add_zero_attn)"),
        visiting([module], Weights(lambda A: A)),
    ):
        module(x, x, x)
    with pytest.raises(UserError, match="without its batch dimension"):
        multi_head(x[0], x[0], x[0], 12, 4, None, None, None, None, False, 0.0, None, None)


@pytest.mark.parametrize("given", [
    {}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu()},
    {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)}, {"enable_gqa": True},
])  # fmt: skip
@pytest.mark.parametrize("kind", [Weights, Heads])
def test_scaled_dot_product_attention_with_every_argument(given, kind):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2, 2))
    if "enable_gqa" not in given:
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    seen = []

    def keep(*parts):
        seen.append([part.shape for part in parts])
        return parts[-1]

    expected = F.scaled_dot_product_attention(q, k, v, **given)
    with interception(kind(keep)):
        found = F.scaled_dot_product_attention(q, k, v, **given)
    torch.testing.assert_close(found, expected)
    assert seen == [[(2, 4, 5, 5)] if kind is Weights else [(2, 4, 5, 8)] * 4]
