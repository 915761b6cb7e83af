"""Restriction of a classifier to some of its classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.masknet.stages import watch
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side


def restrict(model: nn.Module, classes: Sequence[int], side: Side | None = None) -> None:
    """Restrict a model to the logits of some classes, in the given order; in place.

    Args:
        side: of the images to come, pixels; None = as of `probe`.

    Raises:
        UserError: no classes, a repeated class, a class out of range, or a model whose last layer is not linear.
    """
    found = linear_head(model, side)
    if found is None:
        raise UserError(
            f"{type(model).__name__} has no linear layer that returns its logits, and cannot be restricted to some "
            "classes"
        )
    name, head = found
    if not classes or len(set(classes)) < len(classes):
        raise UserError("the classes to train on must be at least one, each given once")
    wrong = [number for number in classes if not 0 <= number < head.out_features]
    if wrong:
        raise UserError(f"class {wrong[0]} is out of range: the model has classes 0..{head.out_features - 1}")
    rows = torch.tensor(classes, device=head.weight.device)
    kept = nn.Linear(head.in_features, len(rows), head.bias is not None, head.weight.device, head.weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(head.weight[rows])
        if head.bias is not None:
            kept.bias.copy_(head.bias[rows])
    kept.train(head.training).requires_grad_(head.weight.requires_grad)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, kept)


def linear_head(model: nn.Module, side: Side | None = None) -> tuple[str, nn.Linear] | None:
    """Return the linear layer whose output is the model's logits, with its dotted name; None if there is none."""
    given: dict[str, tuple[nn.Linear, Tensor]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if type(module) is nn.Linear:
            given[name] = (module, output)

    logits_BK = watch(model, note, side)
    for name, (head, output) in given.items():
        if output.shape == logits_BK.shape and torch.equal(output, logits_BK):
            return name, head
    return None
