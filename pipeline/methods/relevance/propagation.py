"""A forward pass whose backward pass is layer-wise relevance propagation.

Every operation with a rule runs as an autograd function whose backward is the rule. Autograd handles the order, the
branches and operations that only move values. An operation without a rule is refused if relevance would pass it.
Tensors on the path of relevance are float32 or float64 whatever dtype operations compute in, because autograd casts
gradients to the dtype of the values.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.methods.relevance import attention, kinds, layers, products
from saltern.pipeline.methods.relevance.marks import depends, set_mark, tensors_in
from saltern.pipeline.methods.relevance.rules import Rules
from saltern.pipeline.methods.relevance.steps import Barrier, Recorder
from saltern.pipeline.models.interception import Interception, check_visible
from saltern.schemas.errors import UserError


class Propagation:
    """Forward passes of a model that are ready for relevance by given rules.

    Args:
        advice: the alternative, for the message about an operation without a rule.

    Raises:
        UserError: parts of the model are compiled.
    """

    def __init__(self, model: nn.Module, rules: Rules, method: str, advice: str) -> None:
        check_visible(model, method)
        self._checked = False
        self._recorder = Recorder(rules, f"{method} has no rule for {{}} in {type(model).__name__}; {advice}")
        self._recorder.swaps = {
            function: _guarded(function, partial(handler, self._recorder, function))
            for functions, handler in _handlers(rules.safe)
            for function in functions
        }

    def interception(self, x_BCHW: Tensor) -> Interception:
        """Return the context for a forward pass of this input."""
        set_mark(x_BCHW, image=True)
        return self._recorder.interception()

    def check(self, logits_BK: Tensor) -> None:
        """Raise UserError if relevance would pass an operation without a rule; checked once."""
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
            if isinstance(barrier := getattr(node, "rule", None), Barrier):
                raise UserError(barrier.message)
            name = (
                node.name()
                .removeprefix("torch::autograd::")
                .rstrip("0123456789")
                .replace("Backward", "")
                .removesuffix("Grad")
            )
            if name not in kinds.NODES:  # no function of torch showed it
                raise UserError(self._recorder.refusal.format(f"the operation {name}"))
            todo += [following for following, _ in node.next_functions]

    def relevance(
        self, logits_BK: Tensor, inputs: Sequence[Tensor], starts: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """Yield the relevance of the inputs for each relevance of the logits; None for an input that gets none."""
        for left, start_BK in zip(reversed(range(len(starts))), starts, strict=True):
            self._recorder.flow.again = left > 0
            if logits_BK.requires_grad:
                yield torch.autograd.grad(logits_BK, inputs, start_BK, allow_unused=True, retain_graph=left > 0)
            else:
                yield (None,) * len(inputs)


def _handlers(safe: bool) -> list[tuple[frozenset[Any], Callable[..., Any]]]:
    """Return the handler of each function; the last of several counts."""
    return [
        (kinds.ACTIVATIONS, layers.activation),
        (kinds.DROPOUTS, layers.activation),
        (kinds.MEAN_POOLS, layers.pool),
        (kinds.MAX_POOLS, layers.pool if safe else layers.route),
        (kinds.LAYER_NORM, layers.layer_norm),
        (kinds.NORMALISATIONS, layers.normalisation),
        (kinds.SUMS, products.add),
        (kinds.SCALINGS, products.scale),
        (kinds.PRODUCTS, products.product),
        (kinds.GATES, products.gate),
        (kinds.SOFTMAX, attention.softmax),
        (kinds.CONCATENATIONS, products.concatenate if safe else layers.route),
        (kinds.ROUTES, layers.route),
        (frozenset([torch.conv2d]), layers.convolution),
        (frozenset([F.linear]), layers.linear),
        (frozenset([F.batch_norm]), layers.batch_norm),
        (frozenset([F.scaled_dot_product_attention]), attention.scaled_dot_product_attention),
        (frozenset([F.multi_head_attention_forward]), attention.multi_head_attention),
        (frozenset([torch.Tensor.requires_grad_]), layers.requires_grad),
    ]


def _guarded(function: Any, swap: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        known = any(depends(tensor) for tensor in tensors_in([*args, *kwargs.values()]))
        return (swap if known else function)(*args, **kwargs)

    return call
