"""What every method promises, whatever it computes."""

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from references import agree
from torch import nn

import saltern.pipeline.methods
from saltern.pipeline.methods import available, find
from saltern.schemas.errors import UserError

NAMES = [
    name for name in available() if name != "casm"
]  # needs a checkpoint; see tests/pipeline/casm/training/test_train.py
TARGETED = [name for name in NAMES if find(name).needs_target]
ON_PIXELS = [name for name in NAMES if not find(name).layered] + ["cameras", "guided-grad-cam"]
SMALL = {
    "cameras": {"sizes": [16, 24]},
    "integrated-gradients": {"steps": 3},
    "occlusion": {"window": 6, "stride": 5},
    "smoothgrad": {"samples": 3},
}
SLOW = ("occlusion", "score-cam")  # on a torchvision network


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


@pytest.mark.parametrize("name", [*NAMES, "captum:Saliency"])
def test_nothing_leaks_over_200_calls(name, tiny, images):
    x = images(2, 16)

    def tensors():
        return sum(1 for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter))

    with build(name, tiny) as method:
        method(x)
        gc.collect()
        before = tensors()
        gc.disable()  # reference cycles would hold device memory until the collector happens to run
        try:
            for _ in range(200):
                method(x)
            after = tensors()
        finally:
            gc.enable()
    assert after == before


def test_grad_cam_records_nothing_below_its_layer(tiny, images):
    recorded = {}
    for name in ("stem", "stage1", "stage2", "fc"):

        def note(module, args, output, name=name):
            recorded[name] = output.requires_grad

        getattr(tiny, name).register_forward_hook(note)
    build("grad-cam", tiny, layer="stage1")(images(2, 16))
    # This hook is older than the method's own, and so still sees stage1 before it is differentiable.
    assert recorded == {"stem": False, "stage1": False, "stage2": True, "fc": True}
    build("cam", tiny)(images(2, 16))
    assert set(recorded.values()) == {False}


def test_several_layers_in_one_pass(tiny, images):
    x, passes = images(3, 16), []
    names = ["stage2", "stem", "stage1.0"]
    alone = [build("grad-cam", tiny, layer=name)(x) for name in names]
    with build("grad-cam", tiny, layer=names) as method:
        tiny.stem.register_forward_hook(lambda *_: passes.append(1))
        together = method(x)
        assert method.layer == names
    assert len(passes) == 1
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    assert isinstance(build("grad-cam", tiny, layer=["stage2"])(x), torch.Tensor)


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
    x, target = images(2, 64), torch.tensor([1, 2])
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


def test_in_place_relu_after_the_layer_does_not_change_its_activation(tiny, images):
    x, target = images(2, 16), torch.tensor([1, 2])
    with build("grad-cam", tiny, layer="stage2.1") as method:
        in_place = method(x, target)
    tiny.stage2[2].inplace = False
    with build("grad-cam", tiny, layer="stage2.1") as method:
        torch.testing.assert_close(method(x, target), in_place)


def test_a_module_that_runs_several_times_counts_with_its_last_run(network, images):
    x = images(2, 64)
    expected = build("grad-cam", network("resnet18"), layer="layer4")(x)
    recorded = []
    inner = network("resnet18").layer4[1].conv2  # between the two runs of the block's one ReLU
    handle = inner.register_forward_hook(lambda module, args, output: recorded.append(output.requires_grad))
    with build("grad-cam", network("resnet18"), layer="layer4.1.relu") as method:
        for _ in range(2):
            torch.testing.assert_close(method(x), expected)
    handle.remove()
    assert recorded == [True, False]  # how often it runs is learnt in the first call


def test_a_module_that_runs_more_and_less_often_from_call_to_call(tiny, images):
    class Repeating(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mix, self.times = tiny, nn.Conv2d(3, 3, 1), 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.mix(x)
            return self.net(x)

    def fresh(times):
        model.times = times
        return build("grad-cam", model, layer="mix")(images(2, 16))

    model = Repeating()
    expected = {times: fresh(times) for times in (1, 2, 3)}
    with build("grad-cam", model, layer="mix") as method:
        for model.times in (1, 3, 1, 2, 2):
            torch.testing.assert_close(method(images(2, 16)), expected[model.times])
    assert not torch.allclose(expected[1], expected[3], rtol=1e-2)


def test_a_layer_that_gives_a_tuple(tiny, images):
    class Pair(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x), None

    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    x = images(2, 16)
    expected = build("grad-cam", tiny, layer="stage1")(x)
    tiny.stage1 = nn.Sequential(Pair(tiny.stage1), First())
    torch.testing.assert_close(build("grad-cam", tiny, layer="stage1.0")(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gradcam", {}, "did you mean 'grad-cam'"),
        ("zzz", {}, "known: ablation-cam, cam"),
        ("grad-cam", {"layer": "stage3"}, "did you mean 'stage"),
        ("grad-cam", {"layer": "backbone"}, "its layers: stem, stage1, stage2, unused, fc"),
        ("grad-cam", {"layer": ["stage1", "stage1"]}, "given twice"),
        ("cam", {"layer": ["stage1", "stage2"]}, "takes one layer, not 2"),
        ("cam", {"layer": "stage1"}, "use grad-cam"),
        ("gradient", {"layer": "stage1"}, "no target layer"),
        ("gradient", {"reduse": "max"}, "did you mean 'reduce'"),
        ("gradient", {"reduce": "mean"}, "one of max, sum, l2"),
        ("grad-cam", {"reduce": "max"}, "unknown key 'reduce'"),
        ("captum:Salience", {}, "did you mean 'Saliency'"),
        ("captum:Saliency", {"absolute": True}, "unknown key 'absolute'"),
        ("captum:Occlusion", {}, "needs the option 'sliding_window_shapes'"),
        ("no_such_module:Method", {}, "cannot import 'no_such_module'"),
        ("collections:OrderedDic", {}, "did you mean 'OrderedDict'"),
        ("collections:OrderedDict", {}, "no subclass of saltern.pipeline.methods.Method"),
    ],
)
def test_wrong_names_are_answered_with_the_right_ones(name, options, said, tiny):
    with pytest.raises(UserError) as caught:
        build(name, tiny, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "target", "said"),
    [
        ("stage2", torch.tensor([0, 5]), "classes 0..4"),
        ("stage2", torch.tensor([-1, 0]), "classes 0..4"),
        ("stage2", torch.tensor([0, 1, 2]), "one a sample (2)"),
        ("stage2", torch.tensor([0.0, 1.0]), "int64"),
        ("unused", None, "does not run"),
        ("fc", None, "no grid"),
    ],
)
def test_wrong_calls_say_what_is_wrong(layer, target, said, tiny, images):
    with build("grad-cam", tiny, layer=layer) as method, pytest.raises(UserError) as caught:
        method(images(2, 16), target)
    assert said in str(caught.value)


def test_a_layer_beside_the_path_to_the_logits(tiny, images):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.beside = tiny, nn.Conv2d(3, 3, 1)

        def forward(self, x):
            self.beside(x)
            return self.net(x)

    with (
        build("grad-cam", Beside(), layer="beside") as method,
        pytest.raises(UserError, match="do not depend on layer"),
    ):
        method(images(2, 16))


def test_a_model_that_gives_no_logits(tiny, images):
    with build("gradient", tiny.stem) as method, pytest.raises(UserError, match="must return logits"):
        method(images(2, 16))


def test_options_of_all_types_come_from_text(tmp_path: Path, monkeypatch, tiny, images):
    (tmp_path / "own_method.py").write_text(
        "from typing import ClassVar, Literal\n"
        "import torch\n"
        "from saltern.pipeline.methods import Method\n"
        "class Mean(Method):\n"
        '    """Mean over the channels; class-agnostic."""\n'
        "    needs_target = False\n"
        "    ours: ClassVar[int] = 3\n"
        "    _inner: int = 3\n"
        "    steps: int = 2\n"
        "    scale: float = 1.0\n"
        "    name_of: str = 'a'\n"
        "    sizes: list[int] | None = None\n"
        "    both: bool = False\n"
        "    def compute(self, x_BCHW, target_B):\n"
        "        return self.scale * x_BCHW.mean(1), self.model(x_BCHW), None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "own_method:Mean"
    full = {"steps": 2, "scale": 1.0, "name_of": "a", "sizes": None, "both": False}
    assert find(spec).defaults() == full
    given = {"steps": "8", "scale": "2", "name_of": "12", "sizes": "[1, 2]", "both": "true"}
    with build(spec, tiny, **given) as method:
        assert method.options == {"steps": 8, "scale": 2.0, "name_of": "12", "sizes": [1, 2], "both": True}
        assert (method.steps, method.sizes, method.layer) == (8, [1, 2], [])
        torch.testing.assert_close(method(images(2, 16)), 2 * images(2, 16).mean(1))
        assert method.last.target_B is None
    for wrong in ({"steps": "x"}, {"steps": 1.5}, {"steps": True}, {"sizes": [1.5]}, {"both": 1}, {"_inner": 1}):
        with pytest.raises(UserError):
            build(spec, tiny, **wrong)
    sys.modules.pop("own_method")


@pytest.mark.parametrize("name", ["cam", "grad-cam", "guided-backprop", "relevance-cam", "ablation-cam"])
def test_heads_that_serve_training_alone_do_not_matter(name, network, images):
    plain, x = network("googlenet"), images(1, 96)
    with_heads = torchvision.models.GoogLeNet(aux_logits=True, init_weights=False).train()
    with_heads.load_state_dict(plain.state_dict(), strict=False)
    target = plain(x).argmax(1)
    with build(name, plain) as expected, build(name, with_heads) as found:
        agree(found(x, target), expected(x, target), "without auxiliary heads", name, rtol=1e-6)
    assert with_heads.training
    assert isinstance(with_heads(torch.cat([x, x])), tuple)  # in training it has three
