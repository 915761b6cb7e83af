"""User-defined methods, given as `odd_methods:Class`. Each misbehaves in a different way."""

import os
import time

import torch
from torch import Tensor

from saltern.pipeline.methods import Method

Found = tuple[Tensor, Tensor, Tensor | None]


class Mean(Method):
    """Method whose map is the mean over channels: no gradient, no layer, easy to check."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> Found:
        logits_BK = self.model(x_BCHW)
        return self.spoil(x_BCHW.mean(1)), logits_BK, logits_BK.argmax(1) if target_B is None else target_B

    def spoil(self, map_BHW: Tensor) -> Tensor:
        return map_BHW


class Hungry(Mean):
    """Method that runs out of memory with more than three images."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        if len(map_BHW) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return map_BHW


class Odd(Mean):
    """Method whose first map of a batch is NaN, the second zero, the third too large for float16."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        map_BHW = map_BHW.clone()
        if len(map_BHW) > 2:
            map_BHW[0, 0, 0], map_BHW[1], map_BHW[2, 0, 0] = torch.nan, 0, 1e6
        return map_BHW


class Fickle(Mean):
    """Method that returns NaN for the first image of each batch while the variable FICKLE is set."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        map_BHW = map_BHW.clone()
        if "FICKLE" in os.environ:
            map_BHW[0, 0, 0] = torch.nan
        return map_BHW


class Agnostic(Mean):
    """Method that explains no class."""

    needs_target = False

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> Found:
        return x_BCHW.mean(1), self.model(x_BCHW), None


class Slow(Mean):
    """Method with a delay, during which a test can cause a fault; SLOW is in seconds a batch."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("SLOW", "0.1")))
        return map_BHW


class Deadly(Mean):
    """Method that kills its process if an image is black."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        if bool((map_BHW.amax((1, 2)) < -1).any()):
            os.kill(os.getpid(), 9)
        return map_BHW


class Stuck(Mean):
    """Method that never returns if an image is black."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        if bool((map_BHW.amax((1, 2)) < -1).any()):
            time.sleep(600)
        return map_BHW


class Greedy(Mean):
    """Method that runs out of the host's memory if an image is black."""

    def spoil(self, map_BHW: Tensor) -> Tensor:
        if bool((map_BHW.amax((1, 2)) < -1).any()):
            torch.empty(2**50)
        return map_BHW
