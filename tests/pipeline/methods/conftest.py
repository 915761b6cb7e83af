"""Models that the method tests share: seeded random weights, BatchNorm statistics and affine terms randomised too."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from networks import randomise
from thin import thin
from torch import Tensor, nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer, regnet_x_400mf
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

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
        net.image_size = 32
        return randomise(net)


# Networks of torchvision's classes, with few and narrow layers.
SMALL = {
    "small_vit": lambda: VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128),
    "tiny_vit": lambda: VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32),
    "small_swin": lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]),
    "small_convnext": lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]),
    "small_maxvit": lambda: MaxVit((224, 224), 8, 7, [8, 16], [1, 1], 4, 0.0),
    "regnet_x_400mf": regnet_x_400mf,
}


SIDES = {"small_vit": 64, "tiny_vit": 64, "small_maxvit": 224}  # of the images that a method is built with, pixels


@cache
def _randomised(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(SMALL[name]()) if name in SMALL else thin(name, 8 if name == "vgg16_bn" else 4)
    model.image_size = SIDES.get(name, 96)
    return model


@pytest.fixture(scope="session")
def network() -> Callable[[str], nn.Module]:
    """A network of torchvision by name with a quarter of its channels, or one of SMALL, randomised; made once."""
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
    return lambda name: copy.deepcopy(network(name)).double().eval()
