"""Adversarial sanity: whether maps cover the pixels that a small attack changes most.

Shape suffixes: B batch, H W the network's input, N pixels.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from saltern.pipeline.metrics.sanity.similarity import spearman
from saltern.pipeline.metrics.sanity.verdict import Moments, Numbers

SHARE = 0.1  # of the pixels, that count as changed most and as salient most


class Overlap(NamedTuple):
    """How a map and the change of an attack agree."""

    overlap_B: Tensor  # share of the most changed pixels that are among the most salient, in [0, 1]; by chance SHARE
    spearman_B: Tensor  # rank correlation of map and change over all pixels; by chance 0


def overlap(map_BHW: Tensor, change_BHW: Tensor, share: float = SHARE) -> Overlap:
    """Compare maps with the change of each pixel by an attack, which the map must not have guided.

    Of pixels that share the value at the border of the `share`, each counts by the part of them that belongs to it.

    Args:
        map_BHW: any unit.
        change_BHW: size of the change, as the sum of |p| over channels.
        share: of the pixels, in (0, 1].
    """
    within_BN, changed_BN = (_top(values.flatten(1), share) for values in (map_BHW, change_BHW))
    return Overlap((within_BN * changed_BN).sum(1) / changed_BN.sum(1), spearman(map_BHW, change_BHW))


def _top(values_BN: Tensor, share: float) -> Tensor:
    """Return how far each pixel belongs to the highest ones, in [0, 1]; the sum is the number of these."""
    number = max(1, round(share * values_BN.shape[1]))
    border_B1 = values_BN.topk(number, 1).values[:, -1:]
    above_BN, equal_BN = (values_BN > border_B1).double(), (values_BN == border_B1).double()
    return above_BN + equal_BN * (number - above_BN.sum(1, keepdim=True)) / equal_BN.sum(1, keepdim=True)


class Adversarial:
    """The figures of an attack run. Memory does not grow with the images."""

    def __init__(self) -> None:
        self.images = 0
        self._moments = Moments()

    def add(self, overlap_N: Numbers, spearman_N: Numbers) -> None:
        """Add the values of images."""
        self.images += len(overlap_N)
        self._moments.add(np.stack([overlap_N, spearman_N]))

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON."""
        overlap, spearman = self._moments.figures()
        return {
            "images": self.images,
            "share": SHARE,
            "overlap": overlap.to_json(),
            "overlap_by_chance": SHARE,
            "spearman": spearman.to_json(),
        }

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        overlap, spearman = self._moments.figures()
        return [
            f"{self.images} images: of the {100 * SHARE:.0f} % of the pixels that the plain attack changes most, a "
            f"share of {overlap} is among the most salient {100 * SHARE:.0f} % (by chance {SHARE})",
            f"rank correlation of the map and the change of a pixel: {spearman} (by chance 0)",
        ]
