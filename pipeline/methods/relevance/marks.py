"""Marks on the tensors of a forward pass, and values kept for its backward pass."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from saltern.pipeline.methods.relevance.rules import Linear
from saltern.schemas.errors import UserError

Out = TypeVar("Out")


class Held:
    """A value that a rule needs later: the tensor itself, or a copy once the model changes it in place."""

    def __init__(self, tensor: Tensor) -> None:
        self._value = tensor.detach()
        self._version = tensor._version

    def copy(self) -> None:
        """Copy the value, before the tensor changes."""
        self._value = self._value.clone()
        self._version = self._value._version

    def get(self) -> Tensor:
        """Return the value, in float32 at least. Raises UserError if it changed through a view."""
        if self._value._version != self._version:
            raise UserError("the model changes a tensor in place through a view of it; relevance cannot pass there")
        return widened(self._value)


@dataclass
class Mark:
    """Facts about a tensor that depends on the image; kept as an attribute of the tensor."""

    version: int  # of the tensor that the facts hold for
    nonnegative: bool = False
    image: bool = False  # the image itself, perhaps shifted and scaled
    gate: bool = False  # a softmax, sigmoid or norm: a product passes no relevance to it
    source: tuple[Linear, Tensor] | None = None  # the layer that returned it, and that layer's input
    held: Held | None = None


def mark_of(tensor: Any) -> Mark | None:
    """Return the mark of a tensor; None if it does not depend on the image."""
    mark: Mark | None = getattr(tensor, "_relevance_mark", None)
    return Mark(tensor._version) if mark is not None and mark.version != tensor._version else mark


def set_mark(out: Out, **known: Any) -> Out:
    """Mark each tensor of an operation's result, and return the result."""
    for tensor in tensors_in([out]):
        before = mark_of(tensor)  # of an operation that returns its input
        held = None if before is None else before.held
        tensor._relevance_mark = Mark(tensor._version, held=held, **known)  # type: ignore[attr-defined]
    return out


def shared_marks(tensors: Sequence[Any]) -> dict[str, bool]:
    """Return the facts that the result of an operation on these tensors inherits."""
    marks = [mark_of(tensor) for tensor in tensors]
    return {
        "nonnegative": all(mark is not None and mark.nonnegative for mark in marks),
        "image": all(mark is not None and mark.image for mark in marks),
        "gate": all(mark is not None and mark.gate for mark in marks),
    }


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


def depends(tensor: Any) -> bool:
    """Return whether this is a tensor that depends on the image."""
    return isinstance(tensor, Tensor) and (tensor.requires_grad or mark_of(tensor) is not None)


def is_gate(tensor: Any) -> bool:
    """Return whether a product takes this tensor for a constant, although it depends on the image."""
    mark = mark_of(tensor)
    return mark is not None and mark.gate


def carries(tensor: Any) -> bool:
    """Return whether a product passes relevance to this value."""
    return depends(tensor) and not is_gate(tensor)


def hold(tensor: Tensor) -> Held:
    """Keep the value of a tensor for a rule; all rules of one that depends on the image share one `Held`."""
    if not depends(tensor):
        return Held(tensor)
    mark = mark_of(tensor) or Mark(tensor._version)
    mark.held = mark.held or Held(tensor)
    tensor._relevance_mark = mark  # type: ignore[attr-defined]
    return mark.held


def about_to_change(tensor: Tensor) -> None:
    """Copy the value that is held for rules. Call this before an operation in place."""
    mark = mark_of(tensor)
    if mark is not None and mark.held is not None:
        mark.held.copy()
        mark.held = None


def narrowed(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return the tensor in the dtype of a layer's weight. Autocast does its own casts."""
    return tensor if like is None or torch.is_autocast_enabled(tensor.device.type) else tensor.to(like.dtype)


def aligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return floating-point tensors in their widest dtype. Autocast does its own casts."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        return list(tensors)
    widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(widest) for tensor in tensors]


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
