"""Where a classifier is tapped: the ends of its stages, found by running it once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.models.layers import probe
from saltern.pipeline.models.passes import logits_of
from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Stages:
    """Where a model is tapped: its stem, then the ends of its stages at strides 4, 8, 16 and 32."""

    names: tuple[str, ...]  # dotted
    channels: tuple[int, ...]


@dataclass(frozen=True)
class _Ran:
    name: str
    channels: int
    stride: float  # of its output, against the image
    shrinks: float  # output's stride over its input's
    is_block: bool


def find_stages(model: nn.Module) -> Stages:
    """The taps of a model, found by running it once on its own image size, in eval mode.

    A block is a module that holds a convolution and makes the grid at most twice as coarse; what is inside a block is
    not looked at. A stage ends with the last block at its stride, or the last layer where there is no block (VGG). The
    stem ends with the first block or layer at stride 4: ResNet gives maxpool, layer1, layer2, layer3, layer4.

    Raises:
        UserError: the model has no grid at one of the strides 4, 8, 16 and 32, or does not run.
    """
    ran = _trunk(model, _record(model))
    found: list[_Ran | None] = [next((step for step in ran if step.stride == STRIDES[0]), None)]
    for stride in STRIDES:
        there = [step for step in ran if step.stride == stride]
        ends = [step for step in there if step.is_block] or there
        found.append(ends[-1] if ends else None)
    taps = [tap for tap in found if tap is not None]
    if len(taps) < len(found):
        raise UserError(
            f"{type(model).__name__} has no stages at strides 4, 8, 16 and 32 with channels before the grid, which "
            "CASM taps; take a ResNet, RegNet, EfficientNet, MobileNet, DenseNet, VGG or ConvNeXt"
        )
    return Stages(tuple(tap.name for tap in taps), tuple(tap.channels for tap in taps))


def _record(model: nn.Module) -> list[_Ran]:
    ran: list[_Ran] = []
    side = probe(model).shape[-1]

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        pooled = isinstance(module, nn.AdaptiveAvgPool2d)  # to a grid that the image's size does not change
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3] and not pooled:
            given = args[0] if args and isinstance(args[0], Tensor) and args[0].ndim == 4 else output
            inner = [part for part in module.modules() if part is not module]
            is_block = any(isinstance(part, nn.Conv2d) for part in inner) and not isinstance(module, nn.Conv2d)
            after = output.shape[2]
            ran.append(_Ran(name, output.shape[1], side / after, given.shape[2] / after, is_block))

    watch(model, note)
    return ran


def watch(model: nn.Module, note: Callable[[str, nn.Module, Any, Any], None]) -> Tensor:
    """Logits of a model for one fixed random image in eval mode; it is left as it was.

    Args:
        note: is told of each module that runs: its name, itself, its arguments and its output.

    Raises:
        UserError: the model fails on an image of its own size.
    """

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: note(name, module, args, output)

    x_BCHW = probe(model)[:1]
    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(noting(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            return logits_of(model.eval()(x_BCHW))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        size = " x ".join(map(str, x_BCHW.shape[2:]))
        raise UserError(f"{type(model).__name__} fails on a {size} image ({brief(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _trunk(model: nn.Module, ran: list[_Ran]) -> list[_Ran]:
    """What ran, in order, less what is inside a block and modules that ran several times."""
    names = [step.name for step in ran]
    once = [step for step in ran if names.count(step.name) == 1]
    # A container of stages takes the image down by more: it is looked into. So is one that gives no grid itself.
    closed = {step.name for step in once if step.shrinks <= 2}
    return [step for step in once if step.shrinks <= 2 and not closed.intersection(_parents(step.name))]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]
