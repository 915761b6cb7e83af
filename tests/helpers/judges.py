"""Further classifiers for evaluations: `--classifiers judges:other`."""

import torch
from making import Tiny
from torch import nn


def other() -> nn.Module:
    """Return a network of five classes with other weights than `making:tiny`."""
    torch.manual_seed(7)
    return Tiny().eval()


def seven() -> nn.Module:
    """Return a network of seven classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7)).eval()
