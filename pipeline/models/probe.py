"""What a model returns, measured with images of the run's size.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.device import device_lost, out_of_memory
from saltern.pipeline.models.outputs import find_logits, no_logits
from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side, shape_of

Note = Callable[[nn.Module, Any, Any], None]  # takes a module that ran, its arguments and its output
_HEADS = (nn.Linear, nn.Conv2d)


def probe(model: nn.Module, side: Side | None = None) -> Tensor:
    """Return two fixed random images on the model's device.

    Args:
        side: of the images, pixels, or height and width; None = the model's `image_size`, or 224.
    """
    size = side or getattr(model, "image_size", 224)
    shape = shape_of(size if isinstance(size, int | tuple) else 224)
    x_BCHW = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    weight = next(model.parameters(), None)
    return x_BCHW if weight is None else x_BCHW.to(weight.device, weight.dtype)


def watched(model: nn.Module, x_BCHW: Tensor, notes: Mapping[nn.Module, Note]) -> Any:
    """Return the model's output for images, and call the notes of the modules that run.

    Raises:
        UserError: the model fails; the message names the cause and its line.
    """
    with ExitStack() as handles, torch.no_grad():
        for module, note in notes.items():
            handles.callback(module.register_forward_hook(note).remove)
        try:
            return model(x_BCHW)
        except UserError:
            raise
        except Exception as error:
            if device_lost(error) or out_of_memory(error):
                raise
            raise UserError(failure(model, x_BCHW, error)) from error


def failure(model: nn.Module, x_BCHW: Tensor, error: Exception) -> str:
    """Return the line that says on what images a model failed, why, and in which line of which file."""
    size = " x ".join(map(str, x_BCHW.shape[2:]))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    fix = "its forward must take the image alone" if isinstance(error, TypeError) else "give the size that it takes"
    place = f"{frame.filename}:{frame.lineno}"
    return f"{type(model).__name__} fails on images of {size} ({kind}{brief(error)}; {place}); {fix}, or wrap it"


def count_classes(model: nn.Module, side: Side) -> int:
    """Return the number of the model's logits, measured on images of the run's size; the model is in eval mode.

    Raises:
        UserError: the model fails at this size, or does not return the logits of two or more classes.
    """
    kind = type(model).__name__
    if getattr(model, "num_classes", None) == 0:  # timm's mark of a backbone
        raise UserError(f"{kind} has no classifier head (num_classes is 0); give weights that have one")
    last: list[nn.Module] = []
    produced: list[nn.Module] = []  # the last module that changed its input

    def note(module: nn.Module, args: Any, output: Any) -> None:
        last[:] = [module]
        if not isinstance(module, nn.Identity | nn.Dropout):
            produced[:] = [module]

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    output = watched(model, probe(model, side), dict.fromkeys(leaves, note))
    logits_BK = find_logits(output)
    if logits_BK is None:
        raise no_logits(kind, output)
    if last and isinstance(last[0], nn.Identity) and produced and not isinstance(produced[0], _HEADS):
        raise UserError(f"{kind} has no classifier head: its logits come from {type(produced[0]).__name__}; add one")
    _check_logits(kind, logits_BK.float(), produced[0] if produced else None)
    return logits_BK.shape[1]


def _check_logits(kind: str, logits_BK: Tensor, producer: nn.Module | None) -> None:
    if logits_BK.shape[1] < 2:
        raise UserError(
            f"{kind} returns {logits_BK.shape[1]} logit, and a single class always has the score 1; return two from a "
            "factory: torch.cat([torch.zeros_like(z), z], 1) scores class 1 with sigmoid(z)"
        )
    shares = bool((logits_BK >= 0).all() and ((logits_BK.sum(1) - 1).abs() < 1e-3).all())
    if shares or isinstance(producer, nn.Sigmoid | nn.Softmax):
        raise UserError(
            f"{kind} returns probabilities, and their softmax would be stored as scores; return the logits: leave out "
            "the last activation, or return output.log()"
        )
