"""Occlusion against captum and against one window after the other."""

import copy

import captum.attr
import pytest
import torch
from references import agree
from torch import Tensor, nn

from saltern.pipeline.bench.figures import peak_bytes
from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
DRAWN = torch.tensor([7, 500])


def theirs(model, x, target, window, stride, fill):
    found = captum.attr.Occlusion(model).attribute(
        x, (x.shape[1], window, window), (x.shape[1], stride, stride), fill, target, perturbations_per_eval=16
    )
    assert torch.equal(found[:, 0], found[:, 2])
    return found[:, 0]


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "mobilenet_v2", "efficientnet_lite0"])
def test_against_captum(name, network, images):
    # Both in float64: a drop is the difference of two close logits.
    model, x = copy.deepcopy(network(name)).double(), images(2, 40).double()
    expected = theirs(model, x, DRAWN, 16, 12, 0.3)
    agree(build("occlusion", model, window=16, stride=12, fill=0.3)(x, DRAWN), expected, "captum Occlusion", name)


@pytest.mark.parametrize(
    ("name", "side", "window"), [("vgg16_bn", 64, 32), ("small_swin", 64, 32), ("small_vit", 64, 40)]
)
def test_against_captum_in_float32(name, side, window, network, images):
    model, x = network(name), images(1, side)
    with torch.no_grad():
        expected = theirs(model, x, DRAWN[1:], window, window // 2, 0.0)
    found = build("occlusion", model, window=window, stride=window // 2)(x, DRAWN[1:])
    # Logits near 1 carry 1e-7, drops are some 1e-2 of them.
    agree(found, expected, "captum Occlusion", name, rtol=1e-3)


# Edges: windows that fit, that are cut, that touch, of one pixel, and one that leaves a single pixel to the next.
@pytest.mark.parametrize(("window", "stride"), [(4, 4), (5, 3), (5, 5), (1, 1), (14, 1), (6, 2), (16, 16)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23)])
def test_edges_against_captum(window, stride, height, width, tiny, images):
    if (window, stride) == (16, 16):
        height = width = 20
    model, x, target = tiny.double(), images(3, 24)[:, :, :height, :width].double(), torch.tensor([0, 4, 2])
    expected = theirs(model, x, target, window, stride, -0.5)
    for chunk in (1, 7, 64):
        found = build("occlusion", model, window=window, stride=stride, fill=-0.5, chunk=chunk)(x, target)
        agree(found, expected, "captum Occlusion", "tiny")


@pytest.mark.parametrize("window", [16, 17, 200])
def test_one_full_window_is_the_drop_of_the_logit(window, tiny, images):
    x, target = images(2, 16), torch.tensor([0, 3])
    with build("occlusion", tiny, window=window, stride=8, fill=0.2) as method:
        found = method(x, target)
    with torch.no_grad():
        drop_B = (tiny(x) - tiny(torch.full_like(x, 0.2)))[[0, 1], target]
    torch.testing.assert_close(found, drop_B[:, None, None].expand(2, 16, 16))
    assert drop_B.abs().min() > 1e-2


def test_signed_and_of_the_whole_batch(tiny, images):
    x = images(3, 16)
    with build("occlusion", tiny, window=4, stride=2) as method:
        found = method(x)
        assert (found > 0).any()
        assert (found < 0).any()
        assert method.last.target_B.tolist() == tiny(x).argmax(1).tolist()
        torch.testing.assert_close(method.last.logits_BK, tiny(x).detach())
        assert (method.heavy_tailed, method.default_map_dtype) == (False, "uint8")
        laid_out = method(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(laid_out, found, rtol=1e-4, atol=1e-6)
    assert torch.equal(x, images(3, 16))


def test_a_first_layer_in_place_changes_neither_windows_nor_the_callers_images(tiny, images):
    class Shifted(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.inner, self.inplace = tiny, inplace

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.sub_(0.5) if self.inplace else x - 0.5)

    x = images(2, 16)
    found = build("occlusion", Shifted(True), window=4, stride=4)(x)
    torch.testing.assert_close(found, build("occlusion", Shifted(False), window=4, stride=4)(x))
    assert torch.equal(x, images(2, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8, "stride": 9}, "stride.* at most the window"),
        ({"window": 0}, "window"),
        ({"stride": 0}, "stride"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_options_are_checked(options, message, tiny):
    with pytest.raises(UserError, match=message):
        build("occlusion", tiny, **options)


def test_memory_does_not_grow_with_the_windows(network, images):
    model, x = network("resnet18"), images(2, 64)

    def peak(stride):
        method = build("occlusion", model, window=32, stride=stride, chunk=8)
        return peak_bytes(lambda: method(x, DRAWN))

    assert peak(8) <= 1.1 * peak(16)  # 25 windows, 9 windows
