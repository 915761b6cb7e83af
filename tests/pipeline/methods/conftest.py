"""Models that the method tests share: seeded random weights, BatchNorm statistics and affine terms randomised too."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

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


@cache
def _made(name: str) -> nn.Module:
    from thin import few_channels  # imports torchvision, which takes seconds

    return few_channels(name)


@pytest.fixture(scope="session")
def network() -> Callable[[str], nn.Module]:
    """A network of torchvision by name with a quarter of its channels, or a small one, randomised; made once."""
    return _made


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
