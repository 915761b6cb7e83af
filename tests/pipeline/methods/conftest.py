"""Models that the method tests share: seeded random weights, BatchNorm statistics and affine terms randomised too."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from pipeline.classifiers import load

torch.set_num_threads(1)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fresh BatchNorm would be the identity in eval mode, and a zero head would give zero gradients: neither tests."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2, generator=draw)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=draw)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draw)
            nn.init.normal_(module.bias, 0, 0.2, generator=draw)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, module.in_features**-0.5, generator=draw)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1, generator=draw)
    return model.eval()


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


@cache
def _randomised(name: str) -> nn.Module:
    return randomise(load(name, "none").model)


@pytest.fixture(scope="session")
def network() -> Callable[[str], nn.Module]:
    """A model of `pipeline.classifiers` by name, randomised; made once."""
    return _randomised


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Fixed random images, each with a tint of its own: images(count, side)."""

    def make(count: int, side: int) -> Tensor:
        draw = torch.Generator().manual_seed(count + side)
        return torch.randn(count, 3, side, side, generator=draw) + torch.randn(count, 3, 1, 1, generator=draw)

    return make
