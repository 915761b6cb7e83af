"""An operation of a forward pass whose backward is a rule of relevance, and what all handlers of operations share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from saltern.pipeline.methods.relevance import kinds
from saltern.pipeline.methods.relevance.marks import depends, hold, is_gate, set_mark, tensors_in, widened
from saltern.pipeline.methods.relevance.rules import Rules
from saltern.pipeline.models.interception import Interception
from saltern.pipeline.models.passes import full_precision
from saltern.schemas.errors import UserError


@dataclass
class Flow:
    """The state of the backward passes through one graph."""

    again: bool = False  # another follows, which needs the rules


class Step(torch.autograd.Function):
    """An operation whose backward is a rule: `rule(R)` returns the relevance of each input."""

    @staticmethod
    def forward(
        ctx: Any, operation: Callable[..., Tensor], rule: Callable[[Tensor], Any], flow: Flow, *inputs: Tensor
    ) -> Tensor:
        ctx.rule, ctx.flow = rule, flow
        version = inputs[0]._version
        out = operation(*inputs)
        if out is inputs[0] and out._version != version:
            ctx.mark_dirty(out)
            return out
        return widened(out.view_as(out) if out is inputs[0] else out)

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> tuple[Tensor | None, ...]:
        rule = ctx.rule
        if not ctx.flow.again:
            ctx.rule = None  # releases the values that it holds
        with full_precision(R[0].device), torch.no_grad():
            relevance = rule(widened(R[0]))
        return None, None, None, *(relevance if isinstance(relevance, tuple) else (relevance,))


def as_ran(operation: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Return an operation that runs later as it does now, under the same autocast, and returns float32 at least."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(kind, dtype, enabled):
            return widened(operation(*inputs))

    return run


@dataclass
class Barrier:
    """The rule of an operation that has none: it refuses relevance, if any arrives."""

    message: str

    def __call__(self, R: Tensor) -> Tensor:
        raise UserError(self.message)


class Recorder:
    """The rules and swaps of a model's forward passes, and how an operation is recorded for the backward pass.

    Args:
        refusal: message about an operation without a rule, with {} in its place.
    """

    def __init__(self, rules: Rules, refusal: str) -> None:
        self.rules, self.refusal, self.flow = rules, refusal, Flow()
        self.swaps: dict[Any, Callable[..., Any]] = {}

    def interception(self) -> Interception:
        """Return the context in which operations are recorded."""
        return Interception(self.swaps, self._otherwise)

    def step(
        self, operation: Callable[..., Tensor], rule: Callable[[], Callable[[Tensor], Any]], *inputs: Tensor
    ) -> Tensor:
        """Run an operation, as a `Step` if relevance passes it. Only then is its rule built, which may hold values."""
        if not any(tensor.requires_grad for tensor in inputs):
            return operation(*inputs)
        return Step.apply(operation, rule(), self.flow, *inputs)  # type: ignore[no-any-return]

    def share(self, operation: Callable[..., Tensor], *factors: Tensor) -> Tensor:
        """Run an operation that is linear in each factor; `Rules.share` is its rule."""
        device = factors[0].device
        ran = as_ran(operation, device) if torch.is_autocast_enabled(device.type) else None

        def rule() -> Callable[[Tensor], tuple[Tensor, ...]]:
            held = [hold(factor) for factor in factors]
            return lambda R: self.rules.share(operation, [value.get() for value in held], R, ran)

        return self.step(operation, rule, *factors)

    def barrier(self, what: str) -> Barrier:
        """Return the rule that refuses relevance of an operation."""
        return Barrier(self.refusal.format(what))

    def blocked(self, what: str, out: Any) -> Any:
        """Return the result of an operation without a rule: it is refused only if the logits depend on it."""

        def block(tensor: Tensor) -> Tensor:
            return self.step(torch.clone, lambda: self.barrier(what), tensor) if tensor.requires_grad else tensor

        return set_mark(tree_map_only(Tensor, block, out))

    def _otherwise(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = list(tensors_in([*args, *kwargs.values()]))
        what = f"the operation {getattr(function, '__name__', function)}"
        try:
            out = function(*args, **kwargs)
        except RuntimeError as error:
            passes = any(tensor.requires_grad for tensor in given)
            raise (UserError(self.refusal.format(what)) if passes else error) from error
        known = [tensor for tensor in given if depends(tensor)]
        if not known or function in kinds.CONSTANTS:
            return out
        if out is None and args:  # __setitem__ changes its first argument
            set_mark(args[0])
            return None
        if all(map(is_gate, known)):
            return set_mark(out, gate=True)
        return self.blocked(what, out) if any(tensor.requires_grad for tensor in tensors_in([out])) else set_mark(out)
