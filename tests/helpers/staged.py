"""A small staged classifier, and batches of which it classifies some images correctly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def block(narrow: int, wide: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True))


class Staged(nn.Module):
    """A stem that ends with pooling, four stages at strides 4 to 32, a linear head; 6 classes."""

    image_size = 64

    def __init__(self, dropout: float = 0) -> None:
        super().__init__()
        self.conv = block(3, 6, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stage1, self.stage2 = block(6, 8, 1), block(8, 10, 2)
        self.stage3, self.stage4 = block(10, 12, 2), block(12, 16, 2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.pool(self.conv(x))))))
        return self.fc(self.dropout(x.mean((2, 3))))


def randomised(dropout: float = 0) -> Staged:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Staged(dropout)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
        nn.init.normal_(net.fc.weight, 0, 0.4)
    return net


@pytest.fixture
def staged() -> Callable[..., Staged]:
    """Return a function staged(dropout=0) that makes a classifier with fixed weights and BatchNorm statistics."""
    return randomised


@pytest.fixture
def batches() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """Return a function batches(count, size, side) that makes tinted images and their classes."""

    def make(count: int, size: int = 4, side: int = 64) -> list[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(count)
        net = randomised()
        made = []
        for _ in range(count):
            x_BCHW = torch.randn(size, 3, side, side, generator=draw) + torch.randn(size, 3, 1, 1, generator=draw)
            with torch.no_grad():
                label_B = net.train()(x_BCHW).argmax(1)
                # Of a fixed classifier's some are right too; the last is no one's.
                label_B[:2] = net.eval()(x_BCHW[:2]).argmax(1)
            label_B[-1] = (label_B[-1] + 1) % 6
            made.append((x_BCHW, label_B))
        return made

    return make
