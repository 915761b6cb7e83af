"""Models as people bring them: counted at the run's size, or refused in one line that says what to bring instead."""

import pytest
import torch

from saltern.pipeline.methods import build
from saltern.pipeline.models.classifiers import load
from saltern.schemas.errors import UserError

REFUSED = {
    "Probabilities": "returns probabilities.*output.log()",
    "OneLogit": r"returns 1 logit.*torch\.cat\(\[torch\.zeros_like\(z\), z\], 1\)",
    "Headless": "no classifier head: its logits come from ReLU",
    "Backbone": "no classifier head .num_classes is 0",
    "Ambiguous": r"not tuple of 0 \(2, 5\), 1 \(2, 5\); wrap it in a factory, or name one of its tensors 'logits'",
    "Nothing": "not NoneType; wrap it",
    "Keyword": r"TypeError: .*forward must take the image alone",
    "TwoInputs": "TypeError: .*metadata.*forward must take the image alone",
    "Slip": r"AttributeError: .*missing.*module\.py:\d+",
    "Grey": "fails on images of 32 x 32 .*channels",
    "NonSquare": "fails on images of 32 x 32 .*give the size that it takes",
    "Lazy": "lazy layers without weights; run an image through the model in the factory",
    "Segmenter": r"must return logits of shape .batch, classes., not \(2, 16, 4, 4\)",
    "no_module": "returns function, not a torch.nn.Module",
    "needs_an_argument": "must be callable without arguments: missing a required argument: 'depth'",
    "scripted": "returns TorchScript, which shows no layers; return the module before torch.jit.script",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_logits_of_an_image_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        load(f"odd_models:{name}", side=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["frozen", "training", "half", "bfloat16", "parallel", "Nan"])
def test_models_in_another_state_are_taken(name):
    assert load(f"odd_models:{name}", side=32).classes == 5


@pytest.mark.parametrize("name", ["Dict", "OneOfThem", "Pair", "Named", "Data"])
@pytest.mark.parametrize("method", ["grad-cam", "cam", "score-cam", "ablation-cam", "gradient", "lrp", "occlusion"])
def test_logits_in_a_container_are_found(name, method):
    options = {"window": 16, "stride": 16} if method == "occlusion" else {}
    layer = "net.body" if "cam" in method else None
    x_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps = []
    for model in (f"odd_models:{name}", "odd_models:_Around"):
        torch.manual_seed(0)
        loaded = load(model, side=32)
        assert loaded.classes == 5
        with build(method, loaded.model, layer=layer, input_side=32, **options) as built:
            maps.append(built(x_BCHW, torch.tensor([1, 4])))
    assert torch.equal(*maps)


def test_a_layer_that_returns_a_container_is_a_layer():
    x_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps = {}
    for kind in ("plain", "tuple", "named", "dict", "dataclass"):
        model = load(f"odd_models:{kind}_layer", side=32).model
        with build("grad-cam", model, layer="wrap", input_side=32) as method:
            maps[kind] = method(x_BCHW)
            assert method.last.logits_BK.isfinite().all()
    assert maps["plain"].any()
    assert all(torch.equal(map_Bhw, maps["plain"]) for map_Bhw in maps.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "compiled_inside"])
def test_compiled_models_are_taken_without_their_graphs(name):
    loaded = load(f"odd_models:{name}", side=32)
    assert not any(hasattr(module, "_orig_mod") for module in loaded.model.modules())
    plain = load("odd_models:_Around" if name == "compiled_inside" else "making:Tiny", side=32)
    assert list(loaded.model.state_dict()) == list(plain.model.state_dict())
    with build("grad-cam", loaded.model, input_side=32) as method:
        assert method(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_classes_are_counted_at_the_runs_own_size_and_not_guessed_from_a_linear_module():
    assert load("odd_models:Small", side=64).classes == 10
    with pytest.raises(UserError, match=r"fails on images of 224 x 224 .*give the size that it takes"):
        load("odd_models:Small")


def test_sigmoid_of_one_logit_is_the_softmax_of_the_two_that_the_message_names():
    z = torch.tensor([[0.3], [-2.0]])
    torch.testing.assert_close(torch.cat([torch.zeros_like(z), z], 1).softmax(1)[:, 1:], z.sigmoid())
    p = torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(p.log().softmax(1), p)
