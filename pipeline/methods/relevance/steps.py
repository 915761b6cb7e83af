"""An operation of a forward pass whose backward is a rule of relevance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saltern.pipeline.methods.relevance.marks import widened
from saltern.pipeline.models.passes import full_precision


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
