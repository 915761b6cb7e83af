"""Cascading randomisation: how much of a map is left when the model's weights are drawn again from the logits down.

A map that explains the model must change (Adebayo et al. 2018, "Sanity checks for saliency maps"). The entropy of the
map before and after full randomisation is the efficient form (Hedström et al. 2024, "A fresh look at sanity checks for
saliency maps"): `stages=1` computes it, and nothing else.

Shape suffixes: B batch, C H W the network's input, h w a map's own grid.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.methods import Method
from saltern.pipeline.metrics.faithfulness.statistics import map_statistics
from saltern.pipeline.metrics.sanity.randomise import Randomised
from saltern.pipeline.metrics.sanity.similarity import spearman, ssim


class Stage(NamedTuple):
    """The maps of a model whose upper layers are random, against those of the model itself."""

    layer: str  # the last that was drawn again; the layers above it were before
    spearman_B: Tensor  # rank correlation of the maps, in [-1, 1]
    absolute_B: Tensor  # of their absolute values; equal to the above for maps that are not signed
    ssim_B: Tensor  # structural similarity of the absolute values, each divided by its largest
    entropy_B: Tensor  # bits, of the map's values (`faithfulness.statistics`)
    constant_B: Tensor  # bool: the map has one value everywhere, which correlates with nothing


class Cascade(NamedTuple):
    """The result of a cascade for a batch."""

    entropy_B: Tensor  # bits, of the maps of the model itself
    stages: list[Stage]  # the last has all layers random


def cascade(
    model: nn.Module,
    build_method: Callable[[nn.Module], Method],
    x_BCHW: Tensor,
    target_B: Tensor | None,
    randomised: Randomised,
    seed_B: Tensor | None = None,
) -> Cascade:
    """Compare the maps of a model with those of its randomised copies, at the network's input.

    Each stage has one pass of the method over the batch. The classes explained are the same at all stages.

    Args:
        model: in eval mode, on its device; left as it is.
        build_method: returns the method on a model: `lambda model: methods.build(name, model, **options)`.
        x_BCHW: normalised images, on the model's device.
        target_B: int64, the class to explain; None: the model's top-1.
        randomised: copies of the model, the same for every batch.
        seed_B: int64, of each sample's noise, for methods that draw any.
    """
    with build_method(model) as method:
        map_BHW = _map(method, x_BCHW, target_B, seed_B)
        target_B = method.last.target_B
    found = []
    for name, changed in randomised:
        with build_method(changed) as method:
            found.append(_compare(name, map_BHW, _map(method, x_BCHW, target_B, seed_B)))
    return Cascade(map_statistics(map_BHW).entropy_B, found)


def _map(method: Method, x_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor | None) -> Tensor:
    map_Bhw = method(x_BCHW, target_B, seed_B)
    if not isinstance(map_Bhw, Tensor):
        raise TypeError("a cascade takes a method of one layer")
    return upsample(map_Bhw, (x_BCHW.shape[2], x_BCHW.shape[3]))


def _compare(name: str, before_BHW: Tensor, after_BHW: Tensor) -> Stage:
    absolute = before_BHW.abs(), after_BHW.abs()
    return Stage(
        layer=name,
        spearman_B=spearman(before_BHW, after_BHW),
        absolute_B=spearman(*absolute),
        ssim_B=ssim(*map(_unit, absolute)),
        entropy_B=map_statistics(after_BHW).entropy_B,
        constant_B=after_BHW.amax((1, 2)) == after_BHW.amin((1, 2)),
    )


def _unit(map_BHW: Tensor) -> Tensor:
    """Divide maps that are not negative by their largest values; zeros stay."""
    largest_B11 = map_BHW.double().amax((1, 2), keepdim=True)
    return torch.where(largest_B11 > 0, map_BHW / largest_B11.clamp_min(torch.finfo(torch.float64).tiny), 0)
