"""Whether a layer's grid lies over the image: a patch of the input is moved, and the cells that answer must follow.

Shape suffixes: B batch (one image for each place of the patch), C H W the network's input, K channels, h w a grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.models.outputs import tensor_of
from saltern.pipeline.models.passes import frozen
from saltern.pipeline.models.probe import probe, watched
from saltern.pipeline.models.taps import Taps
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side, shape_of

_NAMED = 4  # fitting layers that a message lists
_LEAST = 0.1  # of the answers' movement along one axis to that along the other; of attention maps, one is near 0


def check_layers(model: nn.Module, layers: Sequence[str], side: Side) -> None:
    """Check that the target layers have grids that lie over an image of the run's size.

    Raises:
        UserError: names the layer, and the last layers that fit.
    """
    if not layers:
        return
    taps, x_BCHW = Taps(model, layers), moved_patch(model, side)
    with frozen(model), torch.no_grad():
        _, outputs = taps.forward(x_BCHW)
        for index, (name, output) in enumerate(zip(layers, outputs, strict=True)):
            reason = _misfit(taps, index, output, x_BCHW)
            if reason:
                fitting = ", ".join(fitting_layers(model, side)[-_NAMED:])
                height, width = shape_of(side)
                fix = f"{fitting} (give one as --layer, or a larger --crop)" if fitting else "none; take another method"
                raise UserError(f"layer {name!r} {reason} at {height} x {width} pixels; layers that fit: {fix}")


def fitting_layers(model: nn.Module, side: Side) -> list[str]:
    """Return the layers whose grids lie over the image, in the order in which they first run."""
    names = [name for name, module in model.named_modules() if name and not isinstance(module, torch.jit.ScriptModule)]
    taps, x_BCHW, found = Taps(model, names), moved_patch(model, side), dict[str, None]()

    def note(index: int, module: nn.Module, args: Any, output: Any) -> None:
        try:
            if not _misfit(taps, index, tensor_of(output, names[index]), x_BCHW):
                found[names[index]] = None
        except UserError:
            pass  # no tensor

    notes = {model.get_submodule(name): partial(note, index) for index, name in enumerate(names)}
    with frozen(model):
        watched(model, x_BCHW, notes)
    return list(found)


def moved_patch(model: nn.Module, side: Side | None) -> Tensor:
    """Return four images that differ in the place of a patch: top left, top right, bottom left, bottom right."""
    ground_BCHW = probe(model, side)
    height, width = ground_BCHW.shape[2:]
    patch_CHW = 2 * ground_BCHW[1, :, : max(1, height // 4), : max(1, width // 4)]
    x_BCHW = ground_BCHW[:1].repeat(4, 1, 1, 1)
    for number, x_CHW in enumerate(x_BCHW):
        lower, right = divmod(number, 2)
        top, left = height // 8 + lower * height // 2, width // 8 + right * width // 2
        x_CHW[:, top : top + patch_CHW.shape[1], left : left + patch_CHW.shape[2]] = patch_CHW
    return x_BCHW


def _misfit(taps: Taps, index: int, output: Tensor, x_BCHW: Tensor) -> str:
    """Return why a layer's output does not lie over the image; "" if it does."""
    if output.ndim not in (3, 4) or len(output) != len(x_BCHW):
        return f"gives {tuple(output.shape)}, which is no grid"
    try:
        A_BKhw = taps.grid(index, output, x_BCHW.shape[2:])
    except UserError:
        return f"gives {tuple(output.shape)}, which is no grid"
    height, width = A_BKhw.shape[2:]
    if height * width == 1:
        return "has a grid of 1 x 1 cell, whose map is constant and has no mask,"
    image_height, image_width = x_BCHW.shape[2:]
    turned = abs(height * image_width - width * image_height) > max(image_height, image_width)
    if turned or height > image_height or width > image_width:
        return f"gives {height} x {width} cells, which are no grid of the image"
    return "" if follows(A_BKhw) else f"gives {height} x {width} cells that do not follow a patch moved in the image"


def follows(A_BKhw: Tensor) -> bool:
    """Return whether the centre of the cells that answer moves as the patch does, both down and to the right."""
    answer_Bhw = (A_BKhw - A_BKhw.mean(0)).abs().sum(1).double()
    answer_Bhw = answer_Bhw / answer_Bhw.sum((1, 2), keepdim=True)
    down_B = answer_Bhw.sum(2) @ torch.linspace(0, 1, answer_Bhw.shape[1]).to(answer_Bhw)
    right_B = answer_Bhw.sum(1) @ torch.linspace(0, 1, answer_Bhw.shape[2]).to(answer_Bhw)
    moved = torch.stack([down_B[2:] - down_B[:2], right_B[1::2] - right_B[::2]])
    across = torch.stack([down_B[1::2] - down_B[::2], right_B[2:] - right_B[:2]]).mean(1).abs()
    along = moved.mean(1)
    # NaN, of a model that fails on this image, compares false.
    return bool((moved > 0).all() and along.min() > _LEAST * along.max() and across.max() < along.min())
