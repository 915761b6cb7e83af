"""Score-CAM and Ablation-CAM against pytorch-grad-cam and naive loops; memory."""

import copy
import weakref
from functools import partial

import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from ablation import fast, naive_ablation
from pytorch_grad_cam.ablation_layer import AblationLayerVit
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from references import agree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow
TARGET = torch.tensor([3, 1, 3])


@pytest.fixture
def small(network):
    """A ResNet with few channels, in float64: the weights are small differences of logits."""
    return copy.deepcopy(network("resnet18")).double()


def peer(kind, model, layer, x, monkeypatch, reshape=None, **given):
    """pytorch-grad-cam's map on the layer's grid, before its scaling."""
    monkeypatch.setattr("tqdm.tqdm", lambda steps: steps)
    # Ours enlarges as the other methods do, with align_corners False.
    enlarge = partial(nn.Upsample, mode="bilinear", align_corners=False)
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: enlarge(size=size))
    target = [ClassifierOutputTarget(int(c)) for c in TARGET]
    raw = []
    image = kind.get_cam_image
    monkeypatch.setattr(kind, "get_cam_image", lambda *args: raw.append(image(*args)) or raw[0])
    with kind(model, [layer], reshape_transform=reshape, **given) as cam:
        cam(x, target)
    return torch.from_numpy(raw[0]).relu()


@pytest.mark.parametrize("layer", ["layer1", "layer1.0.conv2"])
def test_score_cam_equals_pytorch_grad_cam(layer, small, images, monkeypatch):
    x = images(3, 32).double()
    found = build("score-cam", small, layer=layer)(x, TARGET)
    expected = peer(pytorch_grad_cam.ScoreCAM, small, small.get_submodule(layer), x, monkeypatch)
    agree(found, expected, "pytorch-grad-cam score-cam (align_corners False)", "resnet18")


@pytest.mark.parametrize("layer", ["layer1", "layer1.0"])
def test_ablation_cam_equals_pytorch_grad_cam(layer, small, images, monkeypatch):
    x = images(3, 32).double()
    with build("ablation-cam", small, layer=layer) as method:
        found = method(x, TARGET)
        assert fast(method)
    expected = peer(pytorch_grad_cam.AblationCAM, small, small.get_submodule(layer), x, monkeypatch)
    agree(found, expected, "pytorch-grad-cam ablation-cam", "resnet18")


class Tokens(nn.Module):
    """A small transformer: a class token, 4 x 4 patches of rectified features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.attend = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mix = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        n, size = x.shape[0], x.shape
        tokens = self.embed(x).reshape(n, 12, size[2] // 4 * (size[3] // 4)).transpose(1, 2)
        tokens = torch.cat([self.token.expand(n, -1, -1), tokens], 1)
        tokens = self.mix(tokens) + 1e-3
        tokens = tokens + self.attend(tokens, tokens, tokens)[0]
        return self.head(self.norm(tokens).view(n, -1, 12)[:, 0])


@pytest.fixture
def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Tokens().eval().double()


def naive_score(model, grid, x, target):
    """From the formula, an image and a channel at a time."""
    maps = []
    for image, c in zip(x, target, strict=True):
        A = grid(image[None])[0]
        scores = []
        for channel in A:
            mask = F.interpolate(channel[None, None], image.shape[1:], mode="bilinear")[0, 0]
            span = mask.max() - mask.min()
            mask = (mask - mask.min()) / span if span > 0 else torch.zeros_like(mask)
            scores.append(model((image * mask)[None])[0, c])
        maps.append(torch.einsum("k,khw->hw", torch.stack(scores).softmax(0), A).relu())
    return torch.stack(maps)


def layout(side):
    return lambda tokens_BTK: tokens_BTK[:, 1:].transpose(1, 2).reshape(len(tokens_BTK), -1, side, side)


@torch.no_grad()
def test_tokens_lose_a_feature_everywhere_the_class_token_too(transformer, images, monkeypatch):
    x = images(3, 16).double()
    outputs = []
    transformer.mix[1].register_forward_hook(lambda module, args, output: outputs.append(output))

    def grid(image):
        transformer(image)
        return layout(4)(outputs[-1])

    expected = naive_ablation(transformer, transformer.mix[1], grid, 2, x, TARGET)
    with build("ablation-cam", transformer, layer="mix.1", chunk=5) as method:
        agree(method(x, TARGET), expected, "ablation-cam by naive float64", "small transformer")
        assert fast(method)
    theirs = peer(pytorch_grad_cam.AblationCAM, transformer, transformer.mix[1], x, monkeypatch, layout(4),
                  ablation_layer=AblationLayerVit())  # fmt: skip
    agree(expected, theirs, "pytorch-grad-cam ablation-cam", "small transformer")
    expected = naive_score(transformer, grid, x, TARGET)
    found = build("score-cam", transformer, layer="mix.1")(x, TARGET)
    agree(found, expected, "score-cam by naive float64", "small transformer")


@torch.no_grad()
def test_swin_has_its_channels_last(network, images):
    model = copy.deepcopy(network("small_swin")).double()
    x, module = images(3, 32)[:1].double(), model.get_submodule("features.1.1.norm1")

    def grid(image):
        outputs = []
        handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(image)
        handle.remove()
        return outputs[0].permute(0, 3, 1, 2)

    with build("ablation-cam", model, layer="features.1.1.norm1") as method:
        found = method(x, TARGET[:1])
        assert fast(method)
    expected = naive_ablation(model, module, grid, 3, x, TARGET[:1])
    agree(found, expected, "ablation-cam by naive float64", "small_swin")


@pytest.mark.parametrize("name", ["score-cam", "ablation-cam"])
def test_chunks_do_not_matter(name, tiny, images):
    x = images(3, 16)
    expected = build(name, tiny, layer="stage1")(x, TARGET)
    for chunk in (1, 7, 24):
        torch.testing.assert_close(build(name, tiny, layer="stage1", chunk=chunk)(x, TARGET), expected)
    with pytest.raises(UserError, match="at least 1"):
        build(name, tiny, chunk=0)


@pytest.mark.parametrize("name", ["score-cam", "ablation-cam"])
def test_an_activation_of_zeros_gives_a_map_of_zeros(name, tiny, images):
    with torch.no_grad():
        tiny.stage2[1].weight.zero_()
        tiny.stage2[1].bias.fill_(-1)
    with build(name, tiny) as method:
        assert not method(images(2, 16)).any()
        assert method.last.zero_B.all()


def test_a_logit_of_zero_gives_weights_of_zero(tiny, images):
    with torch.no_grad():
        tiny.fc.weight[2] = 0
        tiny.fc.bias[2] = 0
    with build("ablation-cam", tiny) as method:
        found = method(images(2, 16), torch.tensor([2, 1]))
        assert method.last.zero_B.tolist() == [True, False]
    assert found[1].any()


class Peak(TorchDispatchMode):
    """Largest number of bytes of storages that were made while entered, and lived at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self.live = {key: held for key, held in self.live.items() if held[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return made


@pytest.mark.parametrize("name", ["score-cam", "ablation-cam"])
@pytest.mark.parametrize("channels", [64, 512])
def test_memory_is_that_of_a_forward_pass_of_one_chunk(name, channels, images):
    body = nn.Sequential(nn.Conv2d(3, channels, 1, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(channels, 5)).eval()
    x, chunk = images(2, 64), 16
    with torch.no_grad(), Peak() as one_pass:
        model(images(chunk, 64))
    with build(name, model, layer="1", chunk=chunk) as method:
        method(x)  # compares vmap with a single channel
        with Peak() as seen:
            method(x)
    # Beside the pass: its images, their masks and the batch's own maps. All channels at once: 8 and 64 times as much.
    assert seen.most < 1.1 * one_pass.most + 3 * chunk * 4 * 64 * 64 * 4
