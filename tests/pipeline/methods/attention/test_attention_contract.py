"""What the methods on attention promise beside their maps, on transformers."""

import copy
import gc

import pytest
import torch
import vits
from operations import RAISING, WAITING, operations
from references import agree
from test_contract import ATTENTION, state_of
from test_halves import casts_of, explain
from torch import nn

from saltern.pipeline.methods import build, find
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
FAMILIES = ["timm", "timm-wide", "torchvision", "siglip", "dinov3", "hf-vit"]
TARGETED = [name for name in ATTENTION if find(name).needs_target]


def of(name, family, **given):
    return build(name, vits.made(family), input_side=vits.FAMILIES[family].image, **given)


CHOSEN = (2, 5)


def every(method, x):
    """Return the maps of the chosen classes, (B, classes, h, w)."""
    maps = [method(x, torch.full((len(x),), target)) for target in CHOSEN]
    return torch.stack(maps, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ATTENTION)
def test_batch_of_k_equals_k_single_runs_each_with_its_own_target(name, family):
    x, rank = vits.images_of(family, 3), [0, 1, 0]
    with of(name, family) as method:
        together = every(method, x)
        single = torch.cat([every(method, x[i : i + 1]) for i in range(3)])
        agree(together, single, "batch of 3 = 3 single runs", name, rtol=1e-5)
        own = method(x, torch.tensor(CHOSEN)[rank])
        scale = together.abs().amax()
        assert (own - together[range(3), rank]).abs().amax() <= 1e-5 * scale
    differs = (together[:, 1:] - together[:, :1]).abs().amax() > 1e-3 * scale
    assert differs == (name in TARGETED)


@pytest.mark.parametrize("family", ["timm", "siglip"])
@pytest.mark.parametrize("name", ATTENTION)
def test_several_targets_share_one_forward_and_none_is_top1(name, family):
    x, model = vits.images(2), vits.made(family)
    calls = []
    handle = model.patch_embed.proj.register_forward_hook(lambda *_: calls.append(1))
    number = 3 if name in TARGETED else 1
    with of(name, family) as method:
        order_BK = method.model(x).topk(3, 1).indices
        calls.clear()
        found = method.explain(x, number=number)
        assert len(calls) == 1
        for rank, (maps, last) in enumerate(found):
            torch.testing.assert_close(maps, method(x, order_BK[:, rank]), rtol=1e-5, atol=1e-7)
            assert name not in TARGETED or torch.equal(last.target_B, order_BK[:, rank])
        torch.testing.assert_close(method(x), found[0][0], rtol=1e-5, atol=1e-7)
        assert (method.last.target_B is None) == (name not in TARGETED)
    handle.remove()
    assert find(name).shares_forward()


def whole_state(model):
    return state_of(model), [sorted(vars(module)) for module in model.modules()], [
        hook for module in model.modules() for hook in module._forward_hooks
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["timm", "torchvision", "siglip"])
@pytest.mark.parametrize("name", ATTENTION)
def test_model_is_left_as_found_also_after_an_error(name, family):
    model, x = copy.deepcopy(vits.made(family)), vits.images(2)
    next(model.parameters()).requires_grad_(False)
    model.train()
    before, weights = whole_state(model), {key: value.clone() for key, value in model.state_dict().items()}
    method = build(name, model, input_side=64)
    assert whole_state(model) == before
    method(x)
    assert whole_state(model) == before
    with pytest.raises(RuntimeError):
        method(x[:, :2])  # two channels: the first convolution fails
    if name in TARGETED:
        with pytest.raises(UserError, match="out of range"):
            method(x, torch.tensor([0, 99]))  # after the forward pass
    *_, block = model.get_submodule(vits.FAMILIES[family].blocks)
    last = model.get_submodule(vits.FAMILIES[family].pool) if vits.FAMILIES[family].pool else block
    handle = last.register_forward_hook(lambda *_: 1 / 0)  # inside the part whose attention is seen
    with pytest.raises(ZeroDivisionError):
        method(x)
    handle.remove()
    assert whole_state(model) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ATTENTION)
def test_nothing_leaks(name):
    x = vits.images(2)

    def tensors():
        return sum(1 for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter))

    with of(name, "torchvision") as method:
        method(x)
        gc.collect()
        before = tensors()
        gc.disable()  # reference cycles would hold device memory until the collector happens to run
        try:
            for _ in range(5):
                method(x)
            after = tensors()
        finally:
            gc.enable()
    assert after == before


# Whether the input of each part requires a gradient, which costs memory and a backward pass.
RECORDED = {
    "attention": set(), "rollout": set(), "chefer": {"mlp 0", "block 1", "mlp 1", "block 2", "mlp 2", "head"},
    "legrad": {"mlp 0", "mlp 1", "mlp 2"}, "grad-eclip": {"mlp 2", "head"},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_only_the_gradients_that_the_map_needs_are_recorded(name):
    model, recorded = copy.deepcopy(vits.made("timm")), {}
    with build(name, model, input_side=64) as method:
        parts = {"head": model.head}
        for index, block in enumerate(model.blocks):
            parts |= {f"block {index}": block, f"mlp {index}": block.mlp}
        for part, module in parts.items():

            def note(module, args, part=part):
                recorded.setdefault(part, args[0].requires_grad)

            module.register_forward_pre_hook(note)
        method(vits.images(2))
    assert {part for part, needed in recorded.items() if needed} == RECORDED[name]


@pytest.mark.parametrize("family", ["timm-wide", "torchvision", "siglip"])
@pytest.mark.parametrize("name", ATTENTION)
def test_autocast(name, family):
    x = vits.images_of(family, 2)
    with of(name, family) as method:
        exact = every(method, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = every(method, x.to(memory_format=torch.channels_last))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("name", ATTENTION)
def test_models_in_other_precisions(name, dtype, bound):
    x = vits.images(2)
    with of(name, "timm") as method:
        exact = every(method, x)
    with build(name, copy.deepcopy(vits.made("timm")).to(dtype), input_side=64) as method:
        rough = every(method, x.to(dtype))
        assert method.last.logits_BK.dtype == dtype
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < bound * exact.norm()


# The blocks of torchvision that are not seen ignore autocast on a CPU: torch's fast path has no check for it.
@pytest.mark.parametrize(("name", "family"), [*((name, "timm") for name in ATTENTION), ("chefer", "torchvision")])
def test_no_weight_is_cast_at_a_call_and_maps_are_those_of_autocast(name, family):
    x, target = vits.images(2), torch.tensor([1, 2])
    with build(name, copy.deepcopy(vits.made(family)), input_side=64) as method:
        assert casts_of(method, x, target) > 10
        expected = explain(method, x, target)
        method.halve(x, torch.bfloat16)
        assert torch.equal(explain(method, x, target), expected)
        assert casts_of(method, x, target) == 0


@pytest.mark.parametrize(("name", "parts"), [("attention", 4), ("grad-eclip", 3)])
def test_parts_to_compile_run_outside_of_what_is_seen_and_without_gradients(name, parts):
    model, inside = copy.deepcopy(vits.made("timm")), []
    with build(name, model, input_side=64) as method:
        expected = method(vits.images(2))
        found = method.trunk()
        for part in found:

            def forward(*args, part=part, own=part.forward):
                inside.append(torch.overrides._get_current_function_mode())
                assert not args[0].requires_grad
                return own(*args)

            part.forward = forward
        assert torch.equal(method(vits.images(2)), expected)
    names = [key for key, module in model.named_modules() if module in found]
    assert names[:3] == ["patch_embed", "blocks.0", "blocks.1"]
    assert "blocks.2.attn" not in names
    assert len(names) == parts
    assert inside == [None] * parts


@pytest.mark.parametrize("family", ["timm", "siglip"])
@pytest.mark.parametrize("name", ATTENTION)
def test_no_operation_is_used_that_does_not_repeat_or_waits_for_a_gpu(name, family):
    with of(name, family) as method:
        seen = operations(lambda: method.explain(vits.images(2), number=2 if name in TARGETED else 1))
    assert "convolution" in seen
    assert not seen & RAISING
    # legrad compares the logits of two passes, once a batch.
    assert seen & WAITING == ({"_local_scalar_dense"} if name == "legrad" else set())


@pytest.mark.parametrize("name", ATTENTION)
def test_works_under_no_grad_and_inference_mode(name):
    with of(name, "timm") as method:
        expected = method(vits.images(2))
        with torch.no_grad():
            torch.testing.assert_close(method(vits.images(2)), expected)
        with torch.inference_mode():
            torch.testing.assert_close(method(vits.images(2).clone()), expected)


@pytest.mark.parametrize("name", ATTENTION)
def test_nonfinite_images_are_flagged(name):
    x = vits.images(3)
    x[1, 0, 3, 3] = float("nan")
    with of(name, "timm") as method:
        found = method(x)
        assert method.last.nonfinite_B.tolist() == [False, True, False]
    assert found.isfinite().all()


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 72)])
@pytest.mark.parametrize("name", ATTENTION)
def test_the_map_is_largest_where_a_bright_patch_lies(name, height, width, averages):
    rows, columns = height // 8, width // 8
    x = torch.zeros(rows * columns, 3, height, width)
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        x[cell, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    model = vits.Brightest(averages=averages)
    with build(name, model, input_side=48) as method:
        found = method(x, torch.zeros(len(x), dtype=torch.long))
    assert found.shape == (len(x), rows, columns)
    assert found.flatten(1).argmax(1).tolist() == list(range(rows * columns))
