"""How relevance is recorded for sums, concatenations and products. Handlers are as in `layers`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saltern.pipeline.methods.functions import works_in_place
from saltern.pipeline.methods.relevance.layers import affine
from saltern.pipeline.methods.relevance.marks import (
    about_to_change,
    aligned,
    carries,
    depends,
    hold,
    is_gate,
    set_mark,
    shared_marks,
    tensors_in,
)
from saltern.pipeline.methods.relevance.rules import Linear
from saltern.pipeline.methods.relevance.steps import Recorder
from saltern.pipeline.models.halves import full_of


def add(recorder: Recorder, function: Any, x: Any, other: Any, *, alpha: float = 1, out: None = None) -> Tensor:
    """Run a sum; addends take relevance by their share, a constant tensor too, as a bias does."""
    if not all(map(_takes_share, (x, other), (other, x))):
        return scale(recorder, function, x, other, **({} if alpha == 1 else {"alpha": alpha}))
    if alpha != 1 or out is not None:
        result = function(x, other, alpha=alpha, **({} if out is None else {"out": out}))
        return recorder.blocked(f"{function.__name__} with alpha or out", result)  # type: ignore[no-any-return]
    nonnegative = shared_marks([x, other])["nonnegative"]
    held = [hold(value) for value in (x, other) if x.requires_grad or other.requires_grad]
    if works_in_place(function, (), {}):
        about_to_change(x)

    def rule() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda R: recorder.rules.add(held[0].get(), held[1].get(), R)

    return set_mark(recorder.step(function, rule, x, other), nonnegative=nonnegative)


def _takes_share(addend: Any, other: Any) -> bool:
    """Return whether an addend takes relevance: not a number, nor what shifts the image or a gate."""
    if depends(addend):
        return True
    shared = shared_marks([other])
    return isinstance(addend, Tensor) and addend.numel() > 1 and not shared["image"] and not shared["gate"]


def scale(recorder: Recorder, function: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Run arithmetic of constants and one value that depends on the image; a product of two is `product`."""
    args = (*args, kwargs.pop("other")) if "other" in kwargs else args
    values, name = [x, *args], function.__name__
    multiplies = "mul" in name or "div" in name
    operands = [index for index, value in enumerate(values) if (carries if multiplies else depends)(value)]
    if not operands or (shared_marks([x])["gate"] and not any(map(depends, args))):
        return set_mark(function(*values, **kwargs), gate=True)  # type: ignore[no-any-return]
    in_place = works_in_place(function, (), {})
    if len(operands) == 2 and "mul" in name and not in_place:
        return product(recorder, function, *values, **kwargs)
    if len(operands) != 1 or (operands[0] and ("div" in name or in_place)):
        what = f"{name} of two tensors that depend on the image"
        return recorder.blocked(what, function(*values, **kwargs))  # type: ignore[no-any-return]
    changing = values[operands[0]]
    if in_place:
        about_to_change(changing)
    values = [value.detach() if is_gate(value) else value for value in values]

    def operation(changing: Tensor) -> Tensor:
        values[operands[0]] = changing
        return function(*values, **kwargs)  # type: ignore[no-any-return]

    image = shared_marks([changing])["image"]
    shape = changing.shape
    out = recorder.step(operation, lambda: lambda R: R.sum_to_size(shape), changing)
    return set_mark(out, image=image)


def product(recorder: Recorder, function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Run a product of matrices or of elements: each factor takes half; if one is a constant, the other takes all."""
    leading = [value for value in args if isinstance(value, str)]  # einsum's equation
    factors = list(tensors_in([*args, *kwargs.values()]))
    moving = [index for index, factor in enumerate(factors) if carries(factor)]
    if not moving:
        return set_mark(function(*leading, *factors), gate=True)  # type: ignore[no-any-return]
    if not leading and moving == [0] and factors[1].ndim == 2 and not depends(factors[1]):
        layers = [Linear(weight.T, None) for weight in (factors[1], full_of(factors[1]))]
        return affine(recorder, layers[0], layers[1], factors[0], recorder.rules.linear)
    fixed = [factor.detach() for factor in factors]

    def operation(*carriers: Tensor) -> Tensor:
        values = list(fixed)
        for index, carrier in zip(moving, carriers, strict=True):
            values[index] = carrier
        return function(*leading, *aligned(values))  # type: ignore[no-any-return]

    return set_mark(recorder.share(operation, *(factors[index] for index in moving)))


def gate(recorder: Recorder, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a softmax, sigmoid or norm, a constant in the product that follows."""
    if works_in_place(function, args, kwargs):
        about_to_change(x)
    what = f"the operation {function.__name__.rstrip('_')} outside of a product"
    out = recorder.step(lambda x: function(x, *args, **kwargs), lambda: recorder.barrier(what), x)
    return set_mark(out, gate=True)


def concatenate(recorder: Recorder, function: Any, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Run a concatenation; parts that are zero take no relevance."""
    dim = kwargs.get("dim", args[0] if args else 0)

    def rule() -> Callable[[Tensor], tuple[Tensor, ...]]:
        held, sizes = [hold(tensor) for tensor in tensors], [tensor.shape[dim] for tensor in tensors]
        return lambda R: tuple(
            part * (value.get() != 0) for part, value in zip(torch.split(R, sizes, dim), held, strict=True)
        )

    out = recorder.step(lambda *parts: function(parts, *args, **kwargs), rule, *tensors)
    return set_mark(out, **shared_marks(tensors))
