"""What every method promises, whatever it computes."""

import copy
import gc

import pytest
import torch
from references import agree
from torch import nn

import saltern.pipeline.methods
from saltern.pipeline.methods import available, find
from saltern.pipeline.methods.attention.weights import AttentionMethod
from saltern.schemas.errors import UserError

# These need a checkpoint: tests/pipeline/casm/training and tests/pipeline/localizer make one.
TRAINED = ("casm", "localizer")
# These need a transformer: tests/pipeline/methods/attention has one.
ATTENTION = [name for name, kind in available().items() if issubclass(kind, AttentionMethod)]
NAMES = [name for name in available() if name not in (*TRAINED, *ATTENTION)]
TARGETED = [name for name in NAMES if find(name).needs_target]
ON_PIXELS = [name for name in NAMES if not find(name).layered] + ["cameras", "guided-grad-cam"]
SMALL = {
    "cameras": {"sizes": [16, 24]},
    "integrated-gradients": {"steps": 3},
    "occlusion": {"window": 6, "stride": 5},
    "rise": {"masks": 12, "cells": 3},
    "smoothgrad": {"samples": 3},
}
SLOW = ("occlusion", "rise", "score-cam")  # on a torchvision network


def build(name, model, **given):
    """As saltern.pipeline.methods.build, with options that keep the costly ones quick."""
    return saltern.pipeline.methods.build(name, model, **(SMALL.get(name, {}) | given))


def state_of(model):
    return [
        (
            name,
            module.training,
            getattr(module, "inplace", None),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
            [(key, parameter.requires_grad, parameter.grad is None) for key, parameter in module.named_parameters()],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.slow
def test_registry_describes_itself():
    assert len(NAMES) >= 21
    for name, kind in available().items():
        assert kind.name == name
        assert kind.summary().endswith(".")
        assert "forward" in kind.cost
        assert [spec.name for spec in kind.option_specs()] == list(kind.defaults())
        for spec in kind.option_specs():
            assert spec.help.endswith("."), (name, spec.name)
            assert spec.default in spec.values if isinstance(spec.values, tuple) else spec.values
    assert find("gradient").defaults() == {"reduce": "max", "value": "abs"}
    assert find("grad-cam").defaults() == {}
    reduce, _ = find("gradient").option_specs()
    assert reduce[:3] == ("reduce", "max", ("max", "sum", "l2"))
    assert {spec.name: spec.values for spec in find("cameras").option_specs()}["sizes"] == "list[int] | None"
    assert find("captum:Occlusion").option_specs()[0][:3] == ("sliding_window_shapes", None, "JSON")
    assert find("gradient").heavy_tailed
    assert find("gradient").default_map_dtype == "uint8"
    assert not find("grad-cam").heavy_tailed
    assert find("grad-cam").default_map_dtype == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_call_gives_maps_and_what_the_pass_found(name, tiny, images):
    x = images(3, 16)
    with build(name, tiny) as method:
        found = method(x)
        last = method.last
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.shape == ((3, 16, 16) if name in ON_PIXELS else (3, 8, 8))
    torch.testing.assert_close(last.logits_BK, tiny(x).detach())
    assert not last.logits_BK.requires_grad
    if name in TARGETED:
        assert last.target_B.tolist() == tiny(x).argmax(1).tolist()
    else:
        assert last.target_B is None
    assert last.zero_B.tolist() == last.nonfinite_B.tolist() == [False] * 3
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("name", "model_name"),
    [(name, "tiny") for name in NAMES] + [(name, "resnet18") for name in NAMES if name not in SLOW],
)
def test_batch_of_k_equals_k_single_runs_each_with_its_own_target(name, model_name, tiny, network, images):
    model = tiny if model_name == "tiny" else network(model_name)
    x = images(4, 64)
    with torch.no_grad():
        rank_BK = model(x).argsort(1, descending=True)  # classes for which the CAMs are not zero
    target, changed = rank_BK[range(4), [0, 1, 0, 1]], rank_BK[range(4), [0, 1, 1, 1]]
    with build(name, model) as method:
        together = method(x, target)
        single = torch.cat([method(x[i : i + 1], target[i : i + 1]) for i in range(4)])
        other = method(x, changed)
    # Of each map's largest value: where a map sums terms of both signs, its small values lose more digits.
    agree(together, single, "batch of 4 = 4 single runs", name)
    agree(other[[0, 1, 3]], together[[0, 1, 3]], "other targets beside it", name, rtol=1e-5)
    difference = float((other[2] - together[2]).abs().max() / together[2].abs().max())
    assert difference > 1e-2 if name in TARGETED else difference == 0


@pytest.mark.parametrize("name", TARGETED)
def test_target_none_is_each_samples_top1(name, tiny, images):
    x = images(6, 16)
    top1 = tiny(x).argmax(1)
    with build(name, tiny) as method:
        torch.testing.assert_close(method(x), method(x, top1))
    assert len(set(top1.tolist())) > 1


@pytest.mark.parametrize("name", NAMES)
def test_model_is_left_as_found_also_after_an_error(name, tiny, images):
    tiny.stem[0].weight.requires_grad_(False)
    tiny.stage2.train()
    before, x = state_of(tiny), images(2, 16)
    weights = {key: value.clone() for key, value in tiny.state_dict().items()}
    method = build(name, tiny)
    assert state_of(tiny) == before
    method(x)
    assert state_of(tiny) == before
    with pytest.raises(RuntimeError):
        method(images(2, 16)[:, :2])  # two channels: the first convolution fails
    if name in TARGETED:
        with pytest.raises(UserError):
            method(x, torch.tensor([0, 99]))  # after the forward pass
    assert state_of(tiny) == before
    method.close()
    assert state_of(tiny) == before
    assert all(torch.equal(weights[key], value) for key, value in tiny.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_train_mode_is_explained_in_eval_mode(name, tiny, images):
    with build(name, tiny) as method:
        expected = method(images(2, 16))
        tiny.train()
        torch.testing.assert_close(method(images(2, 16)), expected)
    assert tiny.training


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "captum:Saliency"])
def test_nothing_leaks_over_25_calls(name, tiny, images):
    x = images(2, 16)

    def tensors():
        return sum(1 for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter))

    with build(name, tiny) as method:
        method(x)
        gc.freeze()  # what was there before is neither collected nor counted
        try:
            method(x)
            gc.collect()
            before = tensors()
            gc.disable()  # reference cycles would hold device memory until the collector happens to run
            for _ in range(25):
                method(x)
            after = tensors()
        finally:
            gc.enable()
            gc.unfreeze()
    assert after == before


def test_zero_and_nonfinite_maps_are_flagged_and_never_nan(tiny, images):
    x = images(4, 16)
    x[1, 0, 3, 3] = float("nan")
    with torch.no_grad():
        tiny.fc.weight[2] = -tiny.fc.weight[2].abs()  # nothing speaks for class 2: Grad-CAM is zero everywhere
    target = torch.tensor([0, 0, 2, 2])
    with build("grad-cam", tiny) as method:
        found = method(x, target)
        assert method.last.nonfinite_B.tolist() == [False, True, False, False]
        assert method.last.zero_B.tolist() == [False, False, True, True]
        clean = method(images(4, 16)[:1], target[:1])
    assert found[1:].abs().max() == 0
    torch.testing.assert_close(found[:1], clean)
    for name in NAMES:
        with build(name, tiny) as method:
            assert method(x, target).isfinite().all(), name
            assert method.last.nonfinite_B.tolist() == [False, True, False, False], name


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_channels_last(name, tiny, network, images):
    model = tiny if name in SLOW else network("resnet18")
    x = images(2, 64)
    target = model(x).argmax(1)  # for less likely classes the map of shapley-cam is zero
    with build(name, model) as method:
        exact = method(x, target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = method(x.to(memory_format=torch.channels_last), target)
            assert method.last.logits_BK.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    error = (rough - exact).norm() / exact.norm()
    # bf16 keeps 8 bits: a random ReLU network's pixel gradients feel that far more than its activations do, and
    # occlusion's small differences of logits most.
    assert 0 < error < (0.5 if name in ON_PIXELS else 0.1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-4), (torch.float16, 0.1), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_models_in_other_precisions(name, dtype, bound, tiny, images):
    x, target = images(2, 24), torch.tensor([1, 2])
    with build(name, tiny) as method:
        exact = method(x, target)
    with build(name, copy.deepcopy(tiny).to(dtype)) as method:
        rough = method(x.to(dtype), target)
        assert method.last.logits_BK.dtype == dtype
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_works_under_no_grad_and_inference_mode(name, tiny, images):
    with build(name, tiny) as method:
        expected = method(images(2, 16))
        with torch.no_grad():
            torch.testing.assert_close(method(images(2, 16)), expected)
        with torch.inference_mode():
            x = images(2, 16).clone()
            assert x.is_inference()
            torch.testing.assert_close(method(x), expected)
