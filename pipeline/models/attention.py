"""Attention of chosen modules in a forward pass: its weights in full, or what it combines and returns.

Fused attention never holds its weights, so they are computed in steps, in these modules only.
Shape suffixes: B batch, M heads, Q queries, S keys, D channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.models.interception import Interception, Swap, replaced
from saltern.pipeline.models.multi_head import multi_head
from saltern.schemas.errors import UserError

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class Visitor(Protocol):
    """What happens at each call of attention."""

    def attend(self, q_BMQD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Return the output of attention, (B, M, Q, D).

        Args:
            bias: added to the scaled scores; broadcasts to (B, M, Q, S).
            scale: of the scores.
        """

    def weigh(self, A_BMQS: Tensor) -> Tensor:
        """Return the weights to use by a module that computes them itself."""


class Weights:
    """Visitor that gives attention weights to `keep`, which returns those to use.

    They are float32 at least, also under autocast and in models of 16 bits that use fused attention.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self._keep = keep

    def attend(self, q_BMQD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        # Contiguous keys: of strided ones, the product would copy the transposed form, which takes as long as itself.
        scores_BMQS = (q_BMQD * scale) @ k_BMSD.contiguous().mT
        if bias is not None:
            scores_BMQS = scores_BMQS + bias
        A_BMQS = scores_BMQS.softmax(-1, dtype=torch.promote_types(scores_BMQS.dtype, torch.float32))
        del scores_BMQS  # as large as the weights
        return self._keep(A_BMQS).to(v_BMSD.dtype) @ v_BMSD

    def weigh(self, A_BMQS: Tensor) -> Tensor:
        return self._keep(A_BMQS)


class Heads:
    """Visitor that gives queries, keys, values and the output to `keep`, which returns the output to use."""

    def __init__(self, keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self._keep = keep

    def attend(self, q_BMQD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        o_BMQD = F.scaled_dot_product_attention(q_BMQD, k_BMSD, v_BMSD, bias, scale=scale)
        return self._keep(q_BMQD, k_BMSD, v_BMSD, o_BMQD)

    def weigh(self, A_BMQS: Tensor) -> Tensor:
        raise UserError(
            "the model computes its attention in steps of its own, which show no queries and keys; let it use "
            "scaled_dot_product_attention (timm: TIMM_FUSED_ATTN=1; transformers: attn_implementation sdpa)"
        )


def leaf(tensor: Tensor) -> Tensor:
    """Return a tensor that requires a gradient and has no history."""
    return tensor.detach().requires_grad_()


@contextmanager
def visiting(modules: Sequence[nn.Module], visitor: Visitor) -> Iterator[None]:
    """Let a visitor see the attention of modules while entered, in the order of their calls.

    The outputs of the modules stay the same, up to rounding.
    """
    mode = interception(visitor)

    def within(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return forward(*args, **kwargs)

        return call

    with replaced({module: within(module.forward) for module in modules}):
        yield


def interception(visitor: Visitor) -> Interception:
    """Return a context in which a visitor sees all attention.

    That is each call of scaled_dot_product_attention and multi_head_attention_forward, and each softmax over the last
    of four dimensions.
    """
    found: dict[Callable[..., Any], Swap] = {function: partial(_softmax, visitor, function) for function in _SOFTMAX}
    found[F.scaled_dot_product_attention] = partial(_fused, visitor)
    return Interception({**found, F.multi_head_attention_forward: partial(_in_steps, Interception(found))})


def _in_steps(steps: Interception, *args: Any, **kwargs: Any) -> Any:
    with steps:  # an interception is off while it handles a call
        return multi_head(*args, **kwargs)


def _softmax(visitor: Visitor, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    result = function(*args, **kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return visitor.weigh(result) if result.ndim == 4 and dim in (-1, 3) else result


def _fused(
    visitor: Visitor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    return visitor.attend(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)
