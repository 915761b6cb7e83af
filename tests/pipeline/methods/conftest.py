"""Models that the method tests share: seeded random weights, BatchNorm statistics and affine terms randomised too."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from saltern.pipeline.models.classifiers import load

torch.set_num_threads(1)


class TinyNet(nn.Module):
    """Two convolutional stages with in-place ReLUs, a head after global average pooling; 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.stage1 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.unused = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


@pytest.fixture
def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyNet()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return randomise(net)


# Transformers of torchvision's classes, with few and narrow layers.
SMALL = {
    "small_vit": lambda: VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128),
    "small_swin": lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]),
}


@cache
def _randomised(name: str) -> nn.Module:
    if name not in SMALL:
        return randomise(load(name, "none").model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(SMALL[name]())


@pytest.fixture(scope="session")
def network() -> Callable[[str], nn.Module]:
    """A model of `saltern.pipeline.models.classifiers` or of SMALL by name, randomised; made once."""
    return _randomised


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Fixed random images, each with a tint of its own: images(count, side)."""

    def make(count: int, side: int) -> Tensor:
        draw = torch.Generator().manual_seed(count + side)
        return torch.randn(count, 3, side, side, generator=draw) + torch.randn(count, 3, 1, 1, generator=draw)

    return make


@pytest.fixture
def double(network):
    """Copies of the networks in float64."""

    def make(name):
        model = network(name)
        if name == "vgg16_bn":  # its head of a gigabyte, narrowed
            model = nn.Sequential(OrderedDict(model.named_children()))
            head = nn.Sequential(nn.Flatten(), nn.Linear(25088, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 1000))
            model.classifier = randomise(head)
        return copy.deepcopy(model).double().eval()

    return make
