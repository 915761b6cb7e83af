"""Compute faithfulness pixel by pixel from the definitions; networks with known answers; maps for torch-cam."""

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from making import Tiny
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F

Logits = Callable[[Tensor], Tensor]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network() -> Tiny:
    """Return the same small network at each call, with probabilities that pixels change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tiny().eval()
    model.head.weight.data.mul_(10)
    return model


class Counted:
    """A network that notes how many images each pass had."""

    def __init__(self, logits: Logits) -> None:
        self.logits, self.passes = logits, list[int]()

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        self.passes.append(len(x_BCHW))
        return self.logits(x_BCHW)


class Given:
    """What torch-cam's metrics need of a method: the model, and maps that are given to it."""

    _hooks_off = contextlib.nullcontext

    def __init__(self, model: nn.Module, map_BHW: Tensor) -> None:
        self.model, self.map_BHW = model, map_BHW

    def __call__(self, *_: object, **__: object) -> list[Tensor]:
        return [self.map_BHW]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]


def one_pixel(y: int, x: int) -> Logits:
    """Return a network of two classes that reads the first colour of one pixel: p(class 0) = sigmoid(value)."""
    return lambda x_BCHW: F.pad(x_BCHW[:, 0, y, x, None], (0, 1))


def batch(samples: int = 3, side: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised images, maps with few ties and targets of five classes."""
    draw = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(samples, 3, side, side, generator=draw)
    map_BHW = torch.rand(samples, side, side, generator=draw) * 4 - 1
    return x_BCHW, map_BHW, torch.arange(samples) % 5


def naive_probability(logits: Logits, x_CHW: Tensor, target: int) -> float:
    with torch.no_grad():
        values = [float(value) for value in logits(x_CHW[None])[0]]
    top = max(values)
    return math.exp(values[target] - top) / sum(math.exp(value - top) for value in values)


def naive_blur(x_CHW: Tensor) -> Tensor:
    """Blur as RISE's published `gkern(11, 5)` and convolution do."""
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(point, 5)).float()
    return F.conv2d(x_CHW[:, None], kernel[None, None], padding=5)[:, 0]


def naive_curve(logits: Logits, before_CHW: Tensor, after_CHW: Tensor, map_HW: Tensor, target: int, steps: int) -> Any:
    """Return the probability after each step; pixels change one by one, from the largest value on."""
    height, width = map_HW.shape
    order = sorted(range(height * width), key=lambda at: -float(map_HW.flatten()[at]))  # stable
    image_CHW, curve, changed = before_CHW.clone(), [], 0
    for step in range(steps + 1):
        while changed < step * height * width // steps:
            y, x = divmod(order[changed], width)
            image_CHW[:, y, x] = after_CHW[:, y, x]
            changed += 1
        curve.append(naive_probability(logits, image_CHW, target))
    return curve


def naive_area(curve: list[float]) -> float:
    return sum((one + other) / 2 for one, other in itertools.pairwise(curve)) / (len(curve) - 1)


def naive_unit(map_HW: Tensor) -> Tensor:
    lo, hi = float(map_HW.min()), float(map_HW.max())
    return (map_HW - lo) / (hi - lo)


def naive_masked(x_CHW: Tensor, weight_HW: Tensor, multiply: str) -> Tensor:
    """Multiply the pixels in [0, 1], or the normalised image."""
    if multiply == "normalised":
        return x_CHW * weight_HW
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((x_CHW * std + mean) * weight_HW - mean) / std
