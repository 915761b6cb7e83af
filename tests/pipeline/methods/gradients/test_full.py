"""FullGrad against a loop over layers and channels in float64, and against pytorch-grad-cam."""

import copy

import cv2
import numpy as np
import pytest
import pytorch_grad_cam as theirs
import torch
from networks import randomise
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from references import agree
from torch import nn
from torch.nn import functional as F

from saltern.pipeline.methods import build
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


class Biased(nn.Module):
    """Biases of every kind: of convolutions, BatchNorm, a functional call, ReLU6 and linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.second, self.six = nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU6(inplace=True)
        self.hidden, self.flat, self.fc = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.six(8 * self.second(self.relu(self.norm(self.first(x)))))
        return self.fc(F.relu(self.flat(self.hidden(F.max_pool2d(x, 2).mean((2, 3))))))


@pytest.fixture
def biased():
    torch.manual_seed(0)
    return randomise(Biased())


def scaled(part, rescale, channels):
    """One image's |bias * gradient|, scaled to 0..1 by channel, by layer, or not at all."""
    if rescale == "none":
        return part
    for group in [[channel] for channel in range(channels)] if rescale == "channel" else [list(range(channels))]:
        low, high = part[group].min(), part[group].max()
        part[group] = (part[group] - low) / (high - low) if high > low else part[group] - low
    return part


def naive(model, image_CHW, c, rescale):
    """One image in float64, one layer after the other; checks that all signed parts sum to the logit."""
    model, x = copy.deepcopy(model).double(), image_CHW.double()[None].requires_grad_()
    outputs, biases = [], []

    def note(module, args, output):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            std = (module.running_var + module.eps).sqrt()
            biases.append(module.bias - module.running_mean * module.weight / std)
        elif isinstance(module, nn.ReLU6):
            biases.append(6.0 * (output == 6))
        else:
            biases.append(module.bias)
        outputs.append(output)
        return output.clone()  # in-place activations must not change what is kept

    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.ReLU6, nn.Linear)
    for module in model.modules():
        if isinstance(module, kinds) and (isinstance(module, nn.ReLU6) or module.bias is not None):
            module.register_forward_hook(note)
    logit = model(x)[0, c]
    gradient, *gradients = torch.autograd.grad(logit, [x, *outputs])
    parts = [(gradient * x)[0].detach()]
    for bias, G in zip(biases, gradients, strict=True):
        part = bias * G if bias.shape == G.shape else bias.view(1, -1, *(1,) * (G.ndim - 2)) * G
        parts.append(part[0].detach())
    torch.testing.assert_close(sum(part.sum() for part in parts), logit.detach(), rtol=1e-9, atol=1e-9)
    total = torch.zeros(x.shape[2:], dtype=torch.float64)
    for part in parts:
        if part.ndim == 3:
            positive = scaled(part.abs(), rescale, len(part))
            for channel in positive:
                total += F.interpolate(channel[None, None], x.shape[2:], mode="bilinear")[0, 0]
    return total


@pytest.mark.parametrize("rescale", ["none", "channel", "layer"])
@pytest.mark.parametrize("which", ["biased", "tiny"])
def test_against_one_layer_and_channel_after_the_other(which, rescale, biased, tiny, images):
    model, x, target = {"biased": biased, "tiny": tiny}[which], images(3, 24), torch.tensor([0, 3, 4])
    if which == "biased":
        saturated = []
        biased.six.register_forward_hook(lambda module, args, output: saturated.append(bool((output == 6).any())))
    with build("fullgrad", model, rescale=rescale) as method:
        found = method(x, target)
    expected = torch.stack([naive(model, one, int(c), rescale) for one, c in zip(x, target, strict=True)])
    assert which == "tiny" or all(saturated)
    agree(found, expected, "FullGrad in float64", f"{which} {rescale}")


def test_a_lite_network_with_the_biases_of_saturated_activations(network, images):
    model, x = network("efficientnet_lite0"), images(1, 64)
    c = int(model(x).argmax())
    expected = naive(model, x[0], c, "none")
    agree(build("fullgrad", model)(x, torch.tensor([c])), expected[None], "FullGrad in float64", "efficientnet_lite0")


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_against_pytorch_grad_cam(name, network, images, monkeypatch):
    # It scales each channel, as the formula of the paper does; and adds 1e-7 to the range, which shows.
    def scaled(cam, size):
        ranges = [(one - one.min()) / (one.max() - one.min() or 1) for one in cam]
        return np.float32([cv2.resize(np.float32(one), size) for one in ranges])

    monkeypatch.setattr("pytorch_grad_cam.utils.image.scale_cam_image", scaled)
    model, x, target = network(name), images(2, 64), torch.tensor([7, 500])
    with theirs.FullGrad(model, []) as cam:
        raw = []
        cam.aggregate_multi_layers = raw.append
        cam(x, [ClassifierOutputTarget(int(c)) for c in target])
    model.zero_grad(set_to_none=True)
    found = build("fullgrad", model, rescale="channel")(x, target)
    agree(found, torch.from_numpy(np.float64(raw[0][:, 0])), "pytorch-grad-cam FullGrad", name)


def test_networks_that_are_not_piecewise_linear_are_refused_by_name(network):
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(UserError, match="networks of ReLUs, and Sequential has SiLU; use gradient"):
        build("fullgrad", small, input_side=16)
    with pytest.raises(UserError, match="VisionTransformer has layer_norm"):
        build("fullgrad", network("small_vit"))
    own = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    with pytest.raises(UserError, match="statistics of each batch"):
        build("fullgrad", own.eval(), input_side=8)
