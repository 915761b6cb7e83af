"""The gradient method against finite differences, a plain one-image loop, and captum."""

import sys

import captum.attr
import pytest
import torch
from torch import nn

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
VALUES = {"square": torch.square, "abs": torch.abs, "signed": lambda g: g}
REDUCES = {
    "max": lambda v: v.max(0).values,
    "sum": lambda v: v.sum(0),
    "l2": lambda v: v.pow(2).sum(0).sqrt(),
}
OPTIONS = [(reduce, value) for reduce in REDUCES for value in VALUES]


def naive(model, image_CHW, target, reduce, value):
    """One image, float64, plain autograd on a fresh leaf."""
    leaf = image_CHW.double().clone().requires_grad_()
    model(leaf[None])[0, target].backward()
    return REDUCES[reduce](VALUES[value](leaf.grad))


def test_against_finite_differences(tiny, images):
    model, x, target, step = tiny.double(), images(1, 6).double(), torch.tensor([3]), 1e-6
    difference = torch.zeros_like(x)
    with torch.no_grad():
        for index in range(x.numel()):
            nudge = torch.zeros_like(x).view(-1).index_fill(0, torch.tensor([index]), step).view_as(x)
            difference.view(-1)[index] = (model(x + nudge) - model(x - nudge))[0, 3] / (2 * step)
    for reduce, value in OPTIONS:
        with build("gradient", model, reduce=reduce, value=value) as method:
            found = method(x, target)[0].double()
        expected = REDUCES[reduce](VALUES[value](difference[0]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("reduce", "value"), OPTIONS)
def test_against_one_image_after_the_other(reduce, value, tiny, images):
    x, target = images(5, 16), torch.tensor([0, 1, 2, 3, 4])
    with build("gradient", tiny, reduce=reduce, value=value) as method:
        found = method(x, target)
        assert method.options == {"reduce": reduce, "value": value}
    tiny.double()
    for image, c, row in zip(x, target, found, strict=True):
        expected = naive(tiny, image, int(c), reduce, value).float()
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "side"), [("resnet18", 64), ("densenet121", 64), ("efficientnet_lite0", 64)])
def test_against_captum(name, side, network, images):
    model, x, target = network(name), images(3, side), torch.tensor([7, 500, 7])
    theirs = captum.attr.Saliency(model).attribute(x.clone().requires_grad_(), target, abs=True).detach()
    scale = float(theirs.max())
    for reduce, expected in (("max", theirs.amax(1)), ("sum", theirs.sum(1)), ("l2", theirs.square().sum(1).sqrt())):
        with build("gradient", model, reduce=reduce) as method:
            torch.testing.assert_close(method(x, target), expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["IntegratedGradients", "Saliency", "Deconvolution", "GuidedBackprop"])
def test_captum_by_name(name, network, images):
    model, x, target = network("resnet18"), images(2, 64), torch.tensor([7, 500])
    options = {"n_steps": "4"} if name == "IntegratedGradients" else {}
    with build(f"captum:{name}", model, **options) as method:
        found = method(x, target)
        assert method.options.items() >= ({"n_steps": 4} if options else {}).items()
        assert (method.layer, method.heavy_tailed, method.default_map_dtype) == ([], True, "uint8")
        torch.testing.assert_close(method.last.logits_BK, model(x).detach())
    plain = getattr(captum.attr, name)(model)
    with pytest.warns() if name in ("Deconvolution", "GuidedBackprop") else torch.enable_grad():
        theirs = plain.attribute(x.requires_grad_(), target=target, **({"n_steps": 4} if options else {}))
    torch.testing.assert_close(found, theirs.sum(1).detach().float())


def test_captum_on_a_layer(network, images):
    model, x, target = network("resnet18"), images(2, 64), torch.tensor([7, 500])
    with build("captum:LayerGradCam", model, layer="layer3", relu_attributions=True) as method:
        found = method(x, target)
        assert (method.layer, method.heavy_tailed, method.default_map_dtype) == (["layer3"], False, "float32")
    torch.testing.assert_close(found, build("grad-cam", model, layer="layer3")(x, target), rtol=1e-4, atol=1e-6)

    with build("captum:LayerActivation", model, layer="layer3") as method:
        torch.testing.assert_close(method(x), method._taps.forward(x)[1][0].sum(1))
        assert not method.needs_target
        assert method.last.target_B is None
    with build("captum:GuidedGradCam", model, layer="layer3") as method:
        assert method(x, target).shape == (2, 64, 64)
        assert method.heavy_tailed


def test_captum_window_shapes_are_lists_in_json(tiny, images):
    with build("captum:Occlusion", tiny, sliding_window_shapes="[3, 4, 4]", strides=[3, 4, 4]) as method:
        assert method.options["sliding_window_shapes"] == [3, 4, 4]
        found = method(images(2, 8), torch.tensor([0, 1]))
    # One window a quarter: constant inside, 3 channels' worth of the logit's drop.
    x, quarter = images(2, 8), images(2, 8)
    quarter[:, :, :4, :4] = 0
    drop = (tiny(x) - tiny(quarter)).detach()[[0, 1], [0, 1]]
    torch.testing.assert_close(found[:, :4, :4], (3 * drop)[:, None, None].expand(2, 4, 4), rtol=1e-3, atol=1e-5)


def test_captum_that_is_not_installed_names_the_extra(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match=r"'\.\[captum\]'"):
        build("captum:Saliency", tiny)


def test_first_layer_in_place_leaves_the_callers_images_alone(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)).eval()
    x = images(2, 8)
    build("gradient", model)(x)
    assert torch.equal(x, images(2, 8))
    assert not x.requires_grad
