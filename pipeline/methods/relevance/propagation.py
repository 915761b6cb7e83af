"""A forward pass whose backward pass is layer-wise relevance propagation.

Every operation with a rule runs as an autograd function whose backward is the rule. Autograd handles the order, the
branches and operations that only move values. An operation without a rule is refused if relevance would pass it.
Tensors on the path of relevance are float32 or float64 whatever dtype operations compute in, because autograd casts
gradients to the dtype of the values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.methods.functions import CLAMPS, RECTIFIERS, bounds, works_in_place
from saltern.pipeline.methods.relevance import kinds
from saltern.pipeline.methods.relevance.marks import (
    about_to_change,
    depends,
    hold,
    mark_of,
    set_mark,
    shared_marks,
    tensors_in,
    widened,
)
from saltern.pipeline.methods.relevance.rules import Convolution, Linear, LinearRule, Rules
from saltern.pipeline.methods.relevance.steps import Flow, Step
from saltern.pipeline.models.halves import full_of
from saltern.pipeline.models.interception import Interception, check_visible
from saltern.schemas.errors import UserError


def _narrowed(tensor: Tensor, like: Tensor) -> Tensor:
    # Autocast does its own casts.
    return tensor if torch.is_autocast_enabled(tensor.device.type) else tensor.to(like.dtype)


def _unchanged(R: Tensor) -> Tensor:
    return R


class Propagation:
    """Forward passes of a model that are ready for relevance by given rules.

    Args:
        advice: the alternative, for the message about an operation without a rule.

    Raises:
        UserError: parts of the model are compiled.
    """

    def __init__(self, model: nn.Module, rules: Rules, method: str, advice: str) -> None:
        check_visible(model, method)
        self._rules, self._checked, self._flow = rules, False, Flow()
        self._refusal = f"{method} has no rule for {{}} in {type(model).__name__}; {advice}"
        handlers: list[tuple[frozenset[Any], Any]] = [
            (kinds.ACTIVATIONS, self._activation),
            (kinds.DROPOUTS, self._activation),
            (kinds.MEAN_POOLS, self._pool),
            (kinds.ADAPTIVE_POOLS, self._pool),
            (kinds.MAX_POOLS, self._pool if rules.safe else self._route),
            (kinds.SUMS, self._add),
            (kinds.SCALINGS, self._scale),
            (kinds.CONCATENATIONS, self._concatenate if rules.safe else self._route),
            (kinds.ROUTES, self._route),
        ]
        swaps: dict[Any, Callable[..., Any]] = {
            function: partial(swap, function) for functions, swap in handlers for function in functions
        }
        swaps |= {torch.conv2d: self._convolution, F.linear: self._linear, F.batch_norm: self._batch_norm}
        swaps |= {torch.Tensor.requires_grad_: self._requires_grad}
        self._swaps = {function: _guarded(function, swap) for function, swap in swaps.items()}

    def interception(self, x_BCHW: Tensor) -> Interception:
        """Return the context for a forward pass of this input."""
        set_mark(x_BCHW, image=True)
        return Interception(self._swaps, self._otherwise)

    def check(self, logits_BK: Tensor) -> None:
        """Raise UserError if relevance would pass an operation that no function of torch showed; checked once."""
        if self._checked or logits_BK.grad_fn is None:
            return
        self._checked = True
        seen: set[Any] = set()
        todo: list[Any] = [logits_BK.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = (
                node.name()
                .removeprefix("torch::autograd::")
                .rstrip("0123456789")
                .replace("Backward", "")
                .removesuffix("Grad")
            )
            if name not in kinds.NODES:
                raise UserError(self._refusal.format(f"the operation {name}"))
            todo += [following for following, _ in node.next_functions]

    def relevance(
        self, logits_BK: Tensor, inputs: Sequence[Tensor], starts: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """Yield the relevance of the inputs for each relevance of the logits; None for an input that gets none."""
        for left, start_BK in zip(reversed(range(len(starts))), starts, strict=True):
            self._flow.again = left > 0
            if logits_BK.requires_grad:
                yield torch.autograd.grad(logits_BK, inputs, start_BK, allow_unused=True, retain_graph=left > 0)
            else:
                yield (None,) * len(inputs)

    def _step(
        self, operation: Callable[..., Tensor], rule: Callable[[], Callable[[Tensor], Any]], *inputs: Tensor
    ) -> Tensor:
        """Run an operation, as a `Step` if relevance passes it. Only then is its rule built, which may hold values."""
        if not any(tensor.requires_grad for tensor in inputs):
            return operation(*inputs)
        return Step.apply(operation, rule(), self._flow, *inputs)  # type: ignore[no-any-return]

    def _otherwise(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = list(tensors_in([*args, *kwargs.values()]))
        passes = any(tensor.requires_grad for tensor in given)
        known = any(depends(tensor) for tensor in given)
        refusal = UserError(self._refusal.format(f"the operation {getattr(function, '__name__', function)}"))
        try:
            out = function(*args, **kwargs)
        except RuntimeError as error:
            raise refusal if passes else error from error
        if passes and any(tensor.requires_grad for tensor in tensors_in([out])):
            raise refusal
        if known:  # __setitem__ returns nothing and changes its first argument
            set_mark(args[0] if out is None and args else out)
        return out

    def _route(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(tensors_in([*args, *kwargs.values()]))
        shared = shared_marks(given)
        if function is F.pad and (len(args) > 3 or kwargs.get("value")):
            shared["nonnegative"] = False
        out = function(*args, **kwargs)
        # An operation that returns its input (contiguous) keeps the input's mark.
        return out if any(out is tensor for tensor in given) else set_mark(out, **shared)

    def _requires_grad(self, tensor: Tensor, requires_grad: bool = True) -> Tensor:
        # Taps call this on a target layer's output, where relevance must arrive in float32.
        shared = shared_marks([tensor])
        return set_mark(widened(tensor).requires_grad_(requires_grad), **shared)

    def _refuse(self, what: str, *values: Any) -> None:
        """Raise UserError if relevance would pass, that is from the first target layer on."""
        if any(tensor.requires_grad for tensor in tensors_in(values)):
            raise UserError(self._refusal.format(what))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if depends(weight) or depends(bias):
            self._refuse("linear with weights that depend on the image", input, weight, bias)
        return self._affine(Linear(weight, bias), input, self._rules.linear)

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if depends(weight) or depends(bias):
            self._refuse("conv2d with weights that depend on the image", input, weight, bias)
        dilation = _pair(dilation)
        if padding == "same":
            total = [step * (side - 1) for step, side in zip(dilation, weight.shape[2:], strict=True)]
            padding = [extent // 2 for extent in total]
            if any(extent % 2 for extent in total):  # the odd row or column comes after the image
                input = self._route(F.pad, input, (0, total[1] % 2, 0, total[0] % 2))
        padding = 0 if padding == "valid" else padding
        layer = Convolution(weight, bias, _pair(stride), _pair(padding), dilation, groups)
        first = (mark := mark_of(input)) is not None and mark.image
        return self._affine(layer, input, self._rules.first if first else self._rules.convolution)

    def _affine(self, layer: Linear, x: Tensor, rule: LinearRule) -> Tensor:
        def operation(x: Tensor) -> Tensor:
            return layer.apply(_narrowed(x, layer.weight), layer.weight, layer.bias)

        # Relevance is float32, so its rules take the weights as they were before a cast.
        full = replace(layer, weight=full_of(layer.weight), bias=full_of(layer.bias))
        out = self._step(operation, lambda: _bound(rule, full, x), x)
        return set_mark(out, source=(full, x) if self._rules.merge and x.requires_grad else None)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        def operation(x: Tensor) -> Tensor:
            x = x if weight is None else _narrowed(x, weight)
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

        source = mark.source if (mark := mark_of(input)) is not None else None
        if source is None or training or running_mean is None or running_var is None:
            return set_mark(self._step(operation, lambda: _unchanged, input))
        layer, x = source
        folded = layer.folded(running_mean, running_var, weight, bias, eps)
        rule = self._rules.linear if type(layer) is Linear else self._rules.convolution
        if (mark := mark_of(x)) is not None and mark.image and isinstance(layer, Convolution):
            rule = self._rules.first
        # The value is that of BatchNorm; relevance passes the layer and its BatchNorm in one step.
        return set_mark(self._step(lambda _: operation(input.detach()), lambda: _bound(rule, folded, x), x))

    def _activation(self, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(depends(value) for value in (*args, *kwargs.values())):
            self._refuse(f"{function.__name__} with bounds that depend on the image", x, *args, *kwargs.values())
        nonnegative = shared_marks([x])["nonnegative"]
        if function in RECTIFIERS or function in CLAMPS:
            low, _ = bounds(function, args, kwargs)
            nonnegative = nonnegative or (isinstance(low, int | float) and low >= 0)
        elif function not in kinds.DROPOUTS:
            nonnegative = False
        if works_in_place(function, args, kwargs):
            about_to_change(x)
        out = self._step(lambda x: function(x, *args, **kwargs), lambda: _unchanged, x)
        return set_mark(out, nonnegative=nonnegative)

    def _pool(self, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def operation(x: Tensor) -> Tensor:
            out: Tensor = function(x, *args, **kwargs)
            return out

        def rule() -> Callable[[Tensor], Tensor]:
            held, clamp = hold(x), function in kinds.ADAPTIVE_POOLS
            return lambda R: self._rules.pool(operation, held.get(), clamp, R)

        return set_mark(self._step(operation, rule, x), nonnegative=shared_marks([x])["nonnegative"])

    def _add(self, function: Any, x: Any, other: Any, *, alpha: float = 1, out: None = None) -> Tensor:
        if not (depends(x) and depends(other)):
            return self._scale(function, x, other, **({} if alpha == 1 else {"alpha": alpha}))
        if alpha != 1 or out is not None:
            self._refuse(f"{function.__name__} with alpha or out", x, other)
            return set_mark(function(x, other, alpha=alpha, **({} if out is None else {"out": out})))  # type: ignore[no-any-return]
        nonnegative = shared_marks([x, other])["nonnegative"]
        held = [hold(value) for value in (x, other) if x.requires_grad or other.requires_grad]
        if works_in_place(function, (), {}):
            about_to_change(x)

        def rule() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            return lambda R: self._rules.add(held[0].get(), held[1].get(), R)

        return set_mark(self._step(function, rule, x, other), nonnegative=nonnegative)

    def _scale(self, function: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run arithmetic of constants and one value that depends on the image."""
        args = (*args, kwargs.pop("other")) if "other" in kwargs else args
        operands = [index for index, value in enumerate((x, *args)) if depends(value)]
        if len(operands) != 1 or (operands[0] and "div" in function.__name__):
            self._refuse(f"{function.__name__} of two tensors that depend on the image", x, *args)
            return set_mark(function(x, *args, **kwargs))  # type: ignore[no-any-return]
        values = [x, *args]
        changing = values[operands[0]]
        if works_in_place(function, (), {}):
            about_to_change(changing)

        def operation(changing: Tensor) -> Tensor:
            values[operands[0]] = changing
            return function(*values, **kwargs)  # type: ignore[no-any-return]

        image = shared_marks([changing])["image"]
        shape = changing.shape
        out = self._step(operation, lambda: lambda R: R.sum_to_size(shape), changing)
        return set_mark(out, image=image)

    def _concatenate(self, function: Any, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        dim = kwargs.get("dim", args[0] if args else 0)

        def rule() -> Callable[[Tensor], tuple[Tensor, ...]]:
            held, sizes = [hold(tensor) for tensor in tensors], [tensor.shape[dim] for tensor in tensors]
            return lambda R: tuple(
                part * (value.get() != 0) for part, value in zip(torch.split(R, sizes, dim), held, strict=True)
            )

        out = self._step(lambda *parts: function(parts, *args, **kwargs), rule, *tensors)
        return set_mark(out, **shared_marks(tensors))


def _guarded(function: Any, swap: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        known = any(depends(tensor) for tensor in tensors_in([*args, *kwargs.values()]))
        return (swap if known else function)(*args, **kwargs)

    return call


def _bound(rule: LinearRule, layer: Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    held, nonnegative = hold(x), shared_marks([x])["nonnegative"]

    def bound(R: Tensor) -> Tensor:
        value = held.get()
        return rule(layer.like(value), value, nonnegative, R)

    return bound


def _pair(value: Any) -> list[int]:
    return [int(side) for side in value] if isinstance(value, tuple | list) else [int(value)] * 2
