"""Relevance-CAM against a naive float64 re-implementation, its identities, models as people have them, refusals."""

import copy
import gc
from collections import OrderedDict

import pytest
import torch
from naive_relevance import Naive
from networks import randomise
from references import agree
from relevance_starts import STARTS
from torch import nn
from torch.nn import functional as F

from saltern.pipeline.methods import build
from saltern.pipeline.models.passes import frozen
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
TARGET = torch.tensor([7, 500])
PUBLISHED = {"convolution": "published", "linear": "published"}
# Model, side of the input, layers, initial relevances.
# float64 on both sides: where a residual sum is near zero the rule divides by it, and float32 shows it (1e-4).
NETWORKS = [
    ("resnet18", 64, ["layer1", "layer2", "layer3", "layer4"], ["unit", "paper", "sglrp"]),
    ("resnet50", 64, ["layer1", "layer2", "layer3", "layer4"], ["unit", "paper"]),
    ("vgg16_bn", 32, ["features.6", "features.23", "features.42"], ["paper"]),
    ("densenet121", 64, ["features.pool0", "features.denseblock2", "features"], ["unit"]),
    ("mobilenet_v2", 96, ["features.3", "features.10", "features"], ["unit"]),
    ("googlenet", 64, ["conv3", "inception3b", "inception4c", "inception5b"], ["unit"]),
    ("shufflenet_v2_x0_5", 64, ["stage2", "stage3.1", "conv5"], ["unit"]),
    ("efficientnet_lite0", 64, ["_blocks.2", "_blocks.8", "_swish"], ["unit"]),
]


def relevance_of(method, x, start):
    """Layers' outputs, relevance there, logits."""
    with frozen(method.model):
        logits, outputs = method._forward(x)
        start = start(logits.detach()) if callable(start) else start
        (relevance,) = method._propagation.relevance(logits, outputs, [start])
        return outputs, method._taps.all_reached(relevance), logits


def naives(model, x, layers, **rules):
    return [Naive(model, image, **(rules or PUBLISHED), layers=layers) for image in x]


def expected_maps(tapes, target, start, layer):
    pairs = zip(tapes, target.tolist(), strict=True)
    return torch.stack([tape.run(STARTS[start](tape.logits[0], c)).map(layer) for tape, c in pairs])


@pytest.mark.parametrize(("name", "side", "layers", "starts"), NETWORKS)
def test_maps_equal_the_naive_ones(name, side, layers, starts, double, images):
    model, x = double(name), images(2, side).double()
    tapes = naives(model, x, layers)
    for start in starts:
        with build("relevance-cam", model, layer=layers, init=start) as method:
            maps = method(x, TARGET)
            torch.testing.assert_close(method.last.logits_BK, torch.cat([tape.logits for tape in tapes]))
        for layer, map_Bhw in zip(layers, maps, strict=True):
            expected = expected_maps(tapes, TARGET, start, layer)
            agree(map_Bhw, expected, f"naive Relevance-CAM, init={start}", name)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_folded_batch_norm_equals_the_naive_one(name, double, images):
    layer = {"resnet18": "layer2", "mobilenet_v2": "features.10", "densenet121": "features.transition1"}[name]
    model, x = double(name), images(2, 64).double()
    found = build("relevance-cam", model, layer=layer, bn="merge")(x, TARGET)
    tapes = naives(model, x, [layer], **PUBLISHED, merge=True)
    agree(found, expected_maps(tapes, TARGET, "unit", layer), "naive Relevance-CAM, bn=merge", name)
    assert not torch.allclose(found, build("relevance-cam", model, layer=layer)(x, TARGET), rtol=0.01)


class Odd(nn.Module):
    """What real code has: grouped, dilated and "same" convolutions, in-place and functional calls, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4)
        self.even = nn.Conv2d(8, 8, (4, 2), padding="same")
        self.relu = nn.ReLU(inplace=True)  # reused
        self.deep = nn.Conv2d(20, 6, 3, padding=(0, 2), bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.fc = nn.Linear(6, 5)
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        identity = x
        out = F.silu(self.grouped(x))
        out += identity
        out = self.relu(out)
        other = self.even(out)
        other = other - self.offset
        mixed = torch.cat([out, other.mul_(2), x[:, 2:6].clone()], 1)
        kept = mixed
        mixed = F.avg_pool2d(F.relu(mixed, inplace=True), 3, 2, 1)
        del kept
        mixed = self.deep(F.pad(F.hardtanh(mixed, -1, 6), (1, 0, 0, 1), value=-0.5))
        mixed = F.leaky_relu(mixed + 0.5 * mixed, 0.2)
        return self.fc(self.pool(mixed).mean((2, 3)).view(len(x), -1))


@pytest.fixture
def odd():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Odd()
    return randomise(net)


ODD_LAYERS = ["norm", "grouped", "even", "deep", "pool"]
FEW = torch.tensor([1, 4])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # of the naive forward pass
@pytest.mark.parametrize("merge", [False, True])
def test_odd_operations_equal_the_naive_ones(merge, odd, images):
    model, x = odd.double(), images(2, 20).double()
    tapes = naives(model, x, ODD_LAYERS, **PUBLISHED, merge=merge)
    maps = build("relevance-cam", model, layer=ODD_LAYERS, bn="merge" if merge else "identity")(x, FEW)
    for layer, map_Bhw in zip(ODD_LAYERS, maps, strict=True):
        agree(map_Bhw, expected_maps(tapes, FEW, "unit", layer), "naive Relevance-CAM", f"odd net, {layer}")
    for layer, map_Bhw in zip(ODD_LAYERS, maps, strict=True):  # starting at one layer changes nothing
        alone = build("relevance-cam", model, layer=layer, bn="merge" if merge else "identity")(x, FEW)
        torch.testing.assert_close(alone, map_Bhw)


def matrix_of(conv, x):
    """The convolution as a matrix (outputs, inputs), column by column."""
    basis = torch.eye(x[0].numel(), dtype=x.dtype).view(-1, *x.shape[1:])
    bias = conv.bias
    conv.bias = None
    columns = conv(basis).flatten(1).T
    conv.bias = bias
    return columns.detach()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"padding": "same", "groups": 2},
        {"stride": 2, "dilation": 2, "padding": (2, 1), "groups": 4},
        {"padding": "valid", "bias": False},
    ],
)
def test_relevance_of_each_input_is_its_share_of_what_is_positive(geometry, signed):
    # R_j = sum_i max(0, x_j W_ij) / (sum_j max(0, x_j W_ij) + 2 b_i) R_i, entry by entry.
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, **geometry).double()
    head = nn.Linear(8, 3).double()
    model = nn.Sequential(OrderedDict(start=nn.Tanh() if signed else nn.ReLU(), conv=conv, head=Head(head)))
    x = torch.randn(1, 4, 6, 6).double()
    method = build("relevance-cam", model, layer=["start", "conv"], init="paper")
    outputs, (R_x, R_out), _ = relevance_of(method, x, torch.tensor([[1.0, -0.4, 0.2]]).double())
    R_x, R_out = R_x[0].flatten(), R_out[0].flatten()
    share = (outputs[0].detach()[0].flatten() * matrix_of(conv, x)).clamp(min=0)
    Z = share.sum(1)
    if conv.bias is not None:
        Z = Z + 2 * conv.bias.detach().repeat_interleave(Z.numel() // 8)
    weighted = torch.where(Z == 0, 0.0, R_out / Z)
    torch.testing.assert_close(R_x, (share * weighted[:, None]).sum(0))


class Head(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("resnet50", ["layer1", "layer2", "layer3", "layer4"]),
        ("googlenet", ["inception3b", "inception4c", "inception5b"]),
    ],
)
def test_relevance_is_conserved_at_every_stage(name, layers, double, images):
    model, x = double(name), images(2, 96).double()
    with build("relevance-cam", model, layer=layers) as method:
        start = torch.full((2, 1000), -1 / 1000, dtype=torch.float64).scatter(1, TARGET[:, None], 1.0)
        for R in relevance_of(method, x, start)[1]:
            torch.testing.assert_close(
                R.sum((1, 2, 3)), torch.full((2,), 1 / 1000, dtype=torch.float64), rtol=1e-6, atol=0
            )
            assert R.abs().sum() > 2 / 1000  # of both signs


def test_samples_do_not_mix_and_memory_formats_agree(double, network, images):
    x, target, layers = images(3, 64), torch.tensor([1, 2, 3]), ["layer1", "layer4"]
    method = build("relevance-cam", network("resnet18"), layer=layers)
    together = method(x, target)
    for index in range(3):
        for alone, all_of in zip(method(x[index : index + 1], target[index : index + 1]), together, strict=True):
            agree(alone, all_of[index : index + 1], "single runs", "resnet18 relevance-cam")
    method = build("relevance-cam", double("resnet18"), layer=layers)
    pair = [
        method(x.double().contiguous(memory_format=way), target) for way in (torch.channels_last, torch.preserve_format)
    ]
    for found, expected in zip(*pair, strict=True):
        agree(found, expected, "channels_last", "resnet18 relevance-cam")


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "half"])
def test_low_precision_keeps_relevance_in_float32(how, tiny, images):
    x, layers = images(2, 32), ["stage1", "stage2"]
    expected = build("relevance-cam", tiny, layer=layers)(x, FEW)
    model = copy.deepcopy(tiny)
    if how == "autocast":
        method = build("relevance-cam", model, layer=layers)
        with torch.autocast("cpu", torch.bfloat16):
            found = method(x, FEW)
            _, relevance, _ = relevance_of(method, x, torch.ones_like)
    else:
        dtype = getattr(torch, how)
        method = build("relevance-cam", model.to(dtype), layer=layers)
        found = method(x.to(dtype), FEW)
        _, relevance, _ = relevance_of(method, x.to(dtype), torch.ones_like)
    assert method.last.logits_BK.dtype == (torch.float16 if how == "half" else torch.bfloat16)
    assert {R.dtype for R in relevance} == {torch.float32}
    for map_Bhw, exact in zip(found, expected, strict=True):
        assert map_Bhw.dtype == torch.float32
        agree(map_Bhw, exact, "float32", f"tiny, {how}", rtol=0.05)  # the forward pass has 8 or 11 bits


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_the_model_and_the_caller_are_left_alone(odd, images):
    x = images(2, 20)
    before, plain = copy.deepcopy(odd.state_dict()), odd(x).detach()
    given = x.clone()
    method = build("relevance-cam", odd, layer="grouped")
    with torch.inference_mode():
        inside = method(given, FEW)
    assert torch.equal(inside, method(x, FEW))
    assert torch.equal(given, x)
    assert not hasattr(given, "_relevance_mark")
    assert torch.equal(odd(x), plain)
    assert all(torch.equal(value, before[key]) for key, value in odd.state_dict().items())
    assert not any(hasattr(tensor, "_relevance_mark") for tensor in (*odd.parameters(), *odd.buffers()))
    counts = []
    for _ in range(3):
        method(x, FEW)
        gc.collect()
        counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[-1]


class Branch(nn.Module):
    """A target layer inside a branch: the other branch's share of the sum goes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc((self.left(x) + self.right(x)).mean((2, 3)))


def test_a_branch_gets_its_share_alone(images):
    torch.manual_seed(0)
    model, x = Branch().double(), images(1, 8).double()
    both = build("relevance-cam", model, layer=["left", "right"])(x)
    for layer, map_Bhw in zip(("left", "right"), both, strict=True):
        torch.testing.assert_close(build("relevance-cam", model, layer=layer)(x), map_Bhw)


class Changing(nn.Module):
    """Tensors that a rule needs are changed in place later on."""

    def __init__(self, through_view: bool = False) -> None:
        super().__init__()
        self.through_view = through_view
        self.start, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.inner = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        a = self.start(x)
        b = a + self.inner(a)
        (a.view(-1) if self.through_view else a).relu_()
        b.add_(a).mul_(2)
        return self.fc((a + b).mean((2, 3)))


def test_values_are_those_before_a_change_in_place(images):
    torch.manual_seed(0)
    model, x, target = Changing().double(), images(2, 8).double(), torch.tensor([0, 2])
    layers = ["start", "inner"]
    tapes = naives(model, x, ["inner"])
    found = build("relevance-cam", model, layer=layers)(x, target)
    agree(found[1], expected_maps(tapes, target, "unit", "inner"), "naive Relevance-CAM", "changes in place")
    # By hand: the same network without changes in place.
    model.forward = out_of_place(model)
    torch.testing.assert_close(build("relevance-cam", model, layer=layers)(x, target), found)


def out_of_place(model):
    def forward(x):
        a = model.start(x)
        b = a + model.inner(a)
        a = a.relu()
        b = (b + a) * 2
        return model.fc((a + b).mean((2, 3)))

    return forward


def test_a_change_through_a_view_is_refused(images):
    with pytest.raises(UserError, match="in place through a view"):
        build("relevance-cam", Changing(through_view=True), layer="start")(images(1, 8))
