"""Stages of a classifier, found by running it once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saltern.pipeline.models.passes import logits_of
from saltern.pipeline.models.probe import probe, watched
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Stages:
    """Tapped modules of a model: the end of its stem, then the ends of its stages at strides 4, 8, 16 and 32."""

    names: tuple[str, ...]  # dotted
    channels: tuple[int, ...]


@dataclass(frozen=True)
class _Ran:
    """The record of a module that ran."""

    name: str
    channels: int
    stride: float  # of the output, in pixels of the image
    shrinks: float  # stride of the output over that of the input
    is_block: bool


def find_stages(model: nn.Module, side: Side | None = None) -> Stages:
    """Find the taps of a model by running it once, in eval mode.

    A block is a module that holds a convolution and makes the grid at most twice as coarse; modules inside a block are
    ignored. A stage ends with the last block at its stride, or with the last layer if it has no block (VGG). The stem
    ends with the first block or layer at stride 4: for ResNet the taps are maxpool, layer1, layer2, layer3, layer4.

    Args:
        side: of the images to come, pixels, for a model that takes no others.

    Raises:
        UserError: the model has no grid at one of the strides 4, 8, 16 and 32, or does not run.
    """
    try:  # strides are plain at 224 pixels; at a small side, a grid of one cell can be a pooled one
        ran = _trunk(_record(model, None))
    except UserError:
        ran = _trunk(_record(model, side))
    taps = [module for module in ran if module.stride == STRIDES[0]][:1]
    for stride in STRIDES:
        at_stride = [module for module in ran if module.stride == stride]
        taps += ([module for module in at_stride if module.is_block] or at_stride)[-1:]
    if len(taps) < 1 + len(STRIDES):
        raise UserError(
            f"{type(model).__name__} has no stages at strides 4, 8, 16 and 32 with channels before the grid, which "
            "CASM and localizers tap; use a ResNet, RegNet, EfficientNet, MobileNet, DenseNet, VGG or ConvNeXt"
        )
    return Stages(tuple(tap.name for tap in taps), tuple(tap.channels for tap in taps))


def _record(model: nn.Module, side: Side | None) -> list[_Ran]:
    ran: list[_Ran] = []
    pixels = probe(model, side).shape[-1]

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        pooled = isinstance(module, nn.AdaptiveAvgPool2d)  # its grid does not depend on the image's size
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3] and not pooled:
            given = args[0] if args and isinstance(args[0], Tensor) and args[0].ndim == 4 else output
            inner = [part for part in module.modules() if part is not module]
            is_block = any(isinstance(part, nn.Conv2d) for part in inner) and not isinstance(module, nn.Conv2d)
            after = output.shape[2]
            ran.append(_Ran(name, output.shape[1], pixels / after, given.shape[2] / after, is_block))

    watch(model, note, side)
    return ran


def watch(model: nn.Module, note: Callable[[str, nn.Module, Any, Any], None], side: Side | None = None) -> Tensor:
    """Return the logits of a model for one fixed random image, in eval mode; the model stays as it was.

    Args:
        note: called for each module that runs, with its name, the module, its arguments and its output.
        side: of the image, pixels; None = as of `probe`.

    Raises:
        UserError: the model fails on an image of this size.
    """

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: note(name, module, args, output)

    modes = {module: module.training for module in model.modules()}
    try:
        notes = {module: noting(name) for name, module in model.named_modules() if name}
        return logits_of(watched(model.eval(), probe(model, side)[:1], notes))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trunk(ran: list[_Ran]) -> list[_Ran]:
    """Return the modules that ran, in order, without those inside a block and those that ran several times."""
    names = [module.name for module in ran]
    once = [module for module in ran if names.count(module.name) == 1]
    # A module that shrinks the grid by more than 2 contains several stages; its children count instead.
    closed = {module.name for module in once if module.shrinks <= 2}
    return [module for module in once if module.shrinks <= 2 and not closed.intersection(_parents(module.name))]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]
