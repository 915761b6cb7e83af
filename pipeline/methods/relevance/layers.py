"""How relevance is recorded for layers with weights, normalisations, activations and pools.

A handler takes a recorder, the function that the model called, and its arguments; it returns the function's result.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.methods.functions import CLAMPS, RECTIFIERS, bounds, works_in_place
from saltern.pipeline.methods.relevance import kinds
from saltern.pipeline.methods.relevance.marks import (
    about_to_change,
    depends,
    hold,
    mark_of,
    narrowed,
    set_mark,
    shared_marks,
    tensors_in,
    widened,
)
from saltern.pipeline.methods.relevance.rules import Convolution, Linear, LinearRule
from saltern.pipeline.methods.relevance.steps import Recorder, as_ran
from saltern.pipeline.models.halves import full_of


def _unchanged(R: Tensor) -> Tensor:
    return R


def route(recorder: Recorder, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that only moves values."""
    given = list(tensors_in([*args, *kwargs.values()]))
    shared = shared_marks(given)
    if function is F.pad and (len(args) > 3 or kwargs.get("value")):
        shared["nonnegative"] = False
    out = function(*args, **kwargs)
    # An operation that returns its input (contiguous) keeps the input's mark.
    return out if any(out is tensor for tensor in given) else set_mark(out, **shared)


def linear(recorder: Recorder, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run a linear layer."""
    if depends(weight) or depends(bias):
        out: Tensor = recorder.blocked("linear with weights that depend on the image", function(input, weight, bias))
        return out
    full = Linear(full_of(weight), full_of(bias))
    return affine(recorder, Linear(weight, bias), full, input, recorder.rules.linear)


def convolution(
    recorder: Recorder,
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Run a convolution."""
    if depends(weight) or depends(bias):
        result = function(input, weight, bias, stride, padding, dilation, groups)
        out: Tensor = recorder.blocked("conv2d with weights that depend on the image", result)
        return out
    dilation = _pair(dilation)
    if padding == "same":
        total = [step * (side - 1) for step, side in zip(dilation, weight.shape[2:], strict=True)]
        padding = [extent // 2 for extent in total]
        if any(extent % 2 for extent in total):  # the odd row or column comes after the image
            input = route(recorder, F.pad, input, (0, total[1] % 2, 0, total[0] % 2))
    padding = 0 if padding == "valid" else padding
    layer = Convolution(weight, bias, _pair(stride), _pair(padding), dilation, groups)
    first = (mark := mark_of(input)) is not None and mark.image
    full = replace(layer, weight=full_of(weight), bias=full_of(bias))
    return affine(recorder, layer, full, input, recorder.rules.first if first else recorder.rules.convolution)


def affine(recorder: Recorder, layer: Linear, full: Linear, x: Tensor, rule: LinearRule) -> Tensor:
    """Run a layer. Relevance is float32, so its rule takes the layer as it was before a cast of its weights, `full`."""

    def operation(x: Tensor) -> Tensor:
        return layer.apply(narrowed(x, layer.weight), layer.weight, layer.bias)

    full = replace(full, ran=as_ran(operation, x.device))
    out = recorder.step(operation, lambda: _bound(rule, full, x), x)
    return set_mark(out, source=(full, x) if recorder.rules.merge and x.requires_grad else None)


def _bound(rule: LinearRule, layer: Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    held, nonnegative = hold(x), shared_marks([x])["nonnegative"]

    def bound(R: Tensor) -> Tensor:
        value = held.get()
        return rule(layer.like(value), value, nonnegative, R)

    return bound


def batch_norm(
    recorder: Recorder,
    function: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Run BatchNorm, which passes relevance or is folded into the layer before it."""

    def operation(x: Tensor) -> Tensor:
        return F.batch_norm(narrowed(x, weight), running_mean, running_var, weight, bias, training, momentum, eps)

    source = mark.source if (mark := mark_of(input)) is not None else None
    if source is None or training or running_mean is None or running_var is None:
        return set_mark(recorder.step(operation, lambda: _unchanged, input))
    layer, x = source
    ran = as_ran(operation, x.device)
    folded = replace(layer.folded(running_mean, running_var, weight, bias, eps), ran=lambda x: ran(layer.result(x)))
    rule = recorder.rules.linear if type(layer) is Linear else recorder.rules.convolution
    if (mark := mark_of(x)) is not None and mark.image and isinstance(layer, Convolution):
        rule = recorder.rules.first
    # The value is that of BatchNorm; relevance passes the layer and its BatchNorm in one step.
    return set_mark(recorder.step(lambda _: operation(input.detach()), lambda: _bound(rule, folded, x), x))


def layer_norm(
    recorder: Recorder,
    function: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor:
    """Run LayerNorm, whose standard deviation is a constant for relevance."""

    def operation(x: Tensor) -> Tensor:
        # In the dtype of x: the rule divides by this result, and a rounded x gives another one near zero.
        scale, shift = (None if part is None else part.to(x.dtype) for part in (weight, bias))
        return F.layer_norm(x, normalized_shape, scale, shift, eps)

    def rule() -> Callable[[Tensor], Tensor]:
        held, layer = hold(input), (full_of(weight), full_of(bias), eps, len(normalized_shape))
        return lambda R: recorder.rules.layer_norm(held.get(), *layer, R)

    return set_mark(recorder.step(operation, rule, input))


def normalisation(recorder: Recorder, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a division by a norm, which is a constant for relevance (Achtibat 2024, proposition 3.4)."""
    weight = next((value for value in tensors_in([*args, *kwargs.values()])), None)
    return set_mark(recorder.step(lambda x: function(narrowed(x, weight), *args, **kwargs), lambda: _unchanged, x))


def activation(recorder: Recorder, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run an activation, which passes relevance unchanged."""
    if any(depends(value) for value in (*args, *kwargs.values())):
        what = f"{function.__name__} with bounds that depend on the image"
        refused: Tensor = recorder.blocked(what, function(x, *args, **kwargs))
        return refused
    shared = shared_marks([x])
    nonnegative, gate = shared["nonnegative"], shared["gate"] and function in kinds.DROPOUTS
    if function in RECTIFIERS or function in CLAMPS:
        low, _ = bounds(function, args, kwargs)
        nonnegative = nonnegative or (isinstance(low, int | float) and low >= 0)
    elif function not in kinds.DROPOUTS:
        nonnegative = False
    if works_in_place(function, args, kwargs):
        about_to_change(x)
    out = recorder.step(lambda x: function(x, *args, **kwargs), lambda: _unchanged, x)
    return set_mark(out, nonnegative=nonnegative, gate=gate)


def pool(recorder: Recorder, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a pool; its inputs take relevance by their share."""

    def operation(x: Tensor) -> Tensor:
        out: Tensor = function(x, *args, **kwargs)
        return out

    return set_mark(recorder.share(operation, x), nonnegative=shared_marks([x])["nonnegative"])


def requires_grad(recorder: Recorder, function: Any, tensor: Tensor, requires_grad: bool = True) -> Tensor:
    """Start relevance in float32: taps call this on a target layer's output."""
    shared = shared_marks([tensor])
    return set_mark(widened(tensor).requires_grad_(requires_grad), **shared)


def _pair(value: Any) -> list[int]:
    return [int(side) for side in value] if isinstance(value, tuple | list) else [int(value)] * 2
