"""CAMERAS against a slow one-image float64 program that holds every upsampled channel."""

import copy
import math

import pytest
import torch
from references import agree
from torch import nn
from torch.nn import functional as F

from saltern.pipeline.bench.figures import peak_bytes
from saltern.pipeline.methods import build
from saltern.pipeline.methods.cams import upsampled
from saltern.schemas.errors import UserError

SIZES = (64, 107, 140)


def at_layer(model, module, image_1CHW, target):
    """Logits, activation and gradient, by plain hooks; the class is the image's own top-1 where none is given."""
    held = []

    def keep(module, args, output):
        held.append(output)
        output.retain_grad()
        return output.clone()  # what follows may work in place

    handle = module.register_forward_hook(keep)
    with torch.enable_grad():
        logits = model(image_1CHW.clone().requires_grad_())[0]
        handle.remove()
        chosen = int(logits.argmax()) if target is None else target
        model.zero_grad()
        logits[chosen].backward()
    return chosen, held[-1].detach(), held[-1].grad  # the last run of a shared module


def one_image(model, layer, image_CHW, target, sizes, interpolation="bicubic"):
    """The map, and the sizes that counted; written from the algorithm, channel after channel."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    given = image_CHW[None].double()
    found = []
    for number, size in enumerate(sizes):
        image = given
        if number:
            image = F.interpolate(given, (size, size), mode=interpolation, align_corners=False)
        found.append((size, *at_layer(model, model.get_submodule(layer), image, target)))
    accepted = [entry for entry in found if entry[1] == found[0][1]]
    total = torch.zeros(sizes[0], sizes[0], dtype=torch.double)
    for k in range(found[0][2].shape[1]):
        means = []
        for which in (2, 3):
            mean = torch.zeros(sizes[0], sizes[0], dtype=torch.double)
            for entry in accepted:
                plane = entry[which][:, k : k + 1]
                mean += F.interpolate(plane, (sizes[0], sizes[0]), mode="bilinear", align_corners=False)[0, 0]
            means.append(mean / len(accepted))
        total += means[0] * means[1]
    return total.clamp(min=0), [entry[0] for entry in accepted]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("resnet18", "layer2"),
        ("resnet50", "layer4"),
        ("vgg16_bn", "features.42"),
        ("densenet121", "features"),
        ("mobilenet_v2", "features"),
        ("googlenet", "inception5b"),
        ("efficientnet_lite0", "_swish"),
    ],
)
def test_against_one_image_at_a_time_with_the_class_given(name, layer, network, images):
    # The network runs in float64 here too: in float32 a ReLU input near zero may fall on its other side.
    model, x = copy.deepcopy(network(name)).double(), images(3, 64).double()
    with torch.no_grad():
        target = model(x).argsort(1, descending=True)[torch.arange(3), torch.arange(3)]  # first, second, third choice
    with build("cameras", model, layer=layer, sizes=SIZES) as method:
        found = method(x[:2], target[:2])
    assert found.shape == (2, 64, 64)
    count = 2 if name == "resnet18" else 1
    for row, image, chosen in list(zip(found, x, target.tolist(), strict=False))[:count]:
        expected, counted = one_image(model, layer, image, chosen, SIZES)
        assert counted == list(SIZES)
        agree(row[None], expected[None], "CAMERAS one image in float64", f"{name} {layer}")


def test_swin_reads_channels_last(network, images):
    model, x = copy.deepcopy(network("small_swin")).double(), images(1, 64).double()
    with build("cameras", model, layer="norm", sizes=[64]) as method:
        found = method(x)
    _, A, G = at_layer(model, model.norm, x, None)
    up = [F.interpolate(v.permute(0, 3, 1, 2), (64, 64), mode="bilinear", align_corners=False) for v in (A, G)]
    agree(found, (up[0] * up[1]).sum(1).clamp(min=0), "CAMERAS one image in float64", "small_swin norm")


@pytest.mark.slow
def test_without_a_class_only_sizes_that_agree_with_the_first_count(tiny, images):
    # Enough images that some sizes are rejected in some of them.
    x, sizes = images(60, 24), (24, 40, 56)
    with build("cameras", tiny, layer="stage2", sizes=sizes) as method:
        found = method(x)
        assert torch.equal(method.last.target_B, tiny(x).argmax(1))
    seen = set()
    for row, image in zip(found, x, strict=True):
        expected, counted = one_image(tiny, "stage2", image, None, sizes)
        seen.add(tuple(counted))
        if expected.any():
            agree(row[None], expected[None], "CAMERAS one image in float64, no class", "tiny")
    assert {(24,), (24, 40, 56)} < seen
    assert seen & {(24, 40), (24, 56)}
    assert len({int(c) for c in tiny(x).argmax(1)}) > 1


def test_bilinear_differs_and_is_right(tiny, images):
    x = images(2, 24)
    maps = {}
    for interpolation in ("bilinear", "bicubic"):
        with build("cameras", tiny, layer="stage1", sizes=[24, 40], interpolation=interpolation) as method:
            maps[interpolation] = method(x, torch.tensor([1, 2]))
        expected, _ = one_image(tiny, "stage1", x[1], 2, (24, 40), interpolation)
        agree(maps[interpolation][1:], expected[None], f"CAMERAS one image, {interpolation}", "tiny")
    assert (maps["bilinear"] - maps["bicubic"]).abs().max() > 1e-3 * maps["bicubic"].max()


@pytest.mark.slow
def test_sizes_go_from_the_inputs_in_hundreds_to_below_1000(images):
    net = nn.Sequential(nn.Conv2d(3, 2, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    seen = []
    net[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    with build("cameras", net.eval(), layer="1") as method:
        seen.clear()
        assert method(images(1, 824)).shape == (1, 824, 824)
        assert [shape[2] for shape in seen] == [824, 924]
        seen.clear()
        method(torch.randn(1, 3, 1000, 1000))
        assert [shape[2] for shape in seen] == [1000]
        seen.clear()
        assert method(torch.randn(1, 3, 850, 860)).shape == (1, 850, 860)
        assert [shape[2:] for shape in seen] == [(850, 860), (950, 961)]


def test_first_size_is_the_maps_and_takes_the_input_as_given(tiny, images):
    x = images(2, 24)
    with build("cameras", tiny, layer="stage2", sizes=(48, 24)) as method:
        assert method.options["sizes"] == [48, 24]
        found = method(x, torch.tensor([1, 2]))
    expected, _ = one_image(tiny, "stage2", x[0], 1, (48, 24))
    agree(found[:1], expected[None], "CAMERAS map larger than the input", "tiny")


def test_all_zero_map_is_flagged(tiny, images):
    with torch.no_grad():
        tiny.fc.weight[2] = -tiny.fc.weight[2].abs()  # nothing speaks for class 2
    with build("cameras", tiny, layer="stage2", sizes=[24, 40]) as method:
        found = method(images(2, 24), torch.tensor([2, 1]))
        assert method.last.zero_B.tolist() == [True, False]
        assert not method.last.nonfinite_B.any()
    assert not found[0].any()


def test_chunks_give_the_same_map(tiny, images):
    x = images(5, 24)
    whole = build("cameras", tiny, layer="stage2", sizes=[24, 60])(x)
    seen = []
    tiny.stem.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[::2])))
    with build("cameras", tiny, layer="stage2", sizes=[24, 60], chunk=3) as method:
        seen.clear()
        torch.testing.assert_close(method(x), whole, rtol=1e-4, atol=1e-5 * float(whole.max()))
    assert seen == [(3, 24), (2, 24)] + 5 * [(1, 60)]


@pytest.mark.parametrize(
    ("grids", "size"),
    [
        ([(7, 7), (11, 11), (29, 29)], (224, 224)),
        ([(2, 3), (5, 7)], (37, 50)),
        ([(28, 28), (115, 115)], (112, 112)),  # the second is finer than the output: cells are skipped
        ([(1, 1)], (5, 5)),
        ([(1, 1)], (300, 9)),
    ],
)
def test_product_of_upsampled_means_in_every_tiling(grids, size):
    draw = torch.Generator().manual_seed(0)
    batch, channels = 2, 5
    maps = [[torch.randn(batch, channels, *grid, generator=draw) for grid in grids] for _ in range(2)]
    up = [sum(F.interpolate(m.double(), size, mode="bilinear") for m in side) for side in maps]
    expected = (up[0] * up[1]).sum(1)
    cells = [torch.cat([m.flatten(2).mT for m in side], 1) for side in maps]
    plans = [upsampled.plan(grids, size, channels, torch.device("cpu"))]
    for tile in (4, 16, 64):
        if math.prod(size) < 10_000 or tile < 64:
            axes = upsampled._axes(grids, size, tile)
            plans.append(upsampled._assemble(axes, grids, size, tile, torch.device("cpu")))
    for plan in plans:
        found = upsampled.product(*cells, plan)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": []}, "at least one"),
        ({"sizes": [0]}, "at least 1 pixel"),
        ({"chunk": 0}, "at least one image"),
        ({"interpolation": "nearest"}, "one of bicubic, bilinear"),
        ({"layer": ["stage1", "stage2"]}, "takes one layer"),
    ],
)
def test_wrong_options(options, said, tiny):
    with pytest.raises(UserError, match=said):
        build("cameras", tiny, **options)


def test_a_network_for_one_size_only_is_refused_before_any_work(network):
    with pytest.raises(UserError, match=r"any size.*sizes=\[64\]"):
        build("cameras", network("small_vit"))
    flat = nn.Sequential(nn.Conv2d(3, 2, 32, 32), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 49, 3))
    with pytest.raises(UserError, match="Sequential fails at 324 x 324"):
        build("cameras", flat, layer="1")
    with build("cameras", flat, layer="1", sizes=[224]) as method:
        assert method(torch.randn(1, 3, 224, 224)).shape == (1, 224, 224)


@pytest.mark.slow
def test_peak_memory_at_2048_channels(images):
    net = nn.Sequential(nn.Conv2d(3, 2048, 4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 5))
    x = torch.cat(2 * [images(1, 224)])
    with build("cameras", net.eval(), layer="1", chunk=1) as method:
        one, two = (peak_bytes(lambda n=n: method(x[:n], torch.zeros(n, dtype=torch.long))) for n in (1, 2))
    both = 2 * 2048 * 224 * 224 * 4  # bytes of the upsampled A and G of one image
    assert one < 0.5 * both
    assert two - one < 0.25 * both
    assert two > 2 * 2 * 2048 * 3000 * 4  # it does measure: the cells alone take this
