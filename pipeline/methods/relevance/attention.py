"""How relevance is recorded for attention. Handlers are as in `layers`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saltern.pipeline.methods.relevance.marks import aligned, carries, hold, set_mark, shared_marks
from saltern.pipeline.methods.relevance.products import gate
from saltern.pipeline.methods.relevance.steps import Recorder
from saltern.pipeline.models.multi_head import multi_head, rare_argument


def softmax(recorder: Recorder, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a softmax, a constant or with the rule of AttnLRP."""
    if recorder.rules.softmax == "constant":
        return gate(recorder, function, x, *args, **kwargs)
    dim = kwargs.get("dim", args[0] if args else -1)

    def rule() -> Callable[[Tensor], Tensor]:
        held = hold(x)
        return lambda R: recorder.rules.attention_weights(held.get(), dim, R)

    return set_mark(recorder.step(lambda x: function(x, *args, **kwargs), rule, x), nonnegative=True)


def scaled_dot_product_attention(
    recorder: Recorder,
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run attention: fused if its weights are constants, else in steps."""
    constant = recorder.rules.softmax == "constant"
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if (constant and not carries(value)) or (not constant and enable_gqa):
        what = "attention of values that do not depend on the image" if constant else "attention of grouped queries"
        out: Tensor = recorder.blocked(what, function(query, key, value, attn_mask, **options))
        return out
    if not constant:
        with recorder.interception():
            return _in_steps(query, key, value, attn_mask, is_causal, scale)
    fixed = query.detach(), key.detach()

    def operation(value: Tensor) -> Tensor:
        query, key, values = aligned([*fixed, value])
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.detach().to(query.dtype)
        return function(query, key, values, mask, **options)  # type: ignore[no-any-return]

    return set_mark(recorder.share(operation, value), nonnegative=shared_marks([value])["nonnegative"])


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _in_steps(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return _scores(query, key, mask, is_causal, scale).softmax(-1) @ value


def multi_head_attention(recorder: Recorder, function: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Run `F.multi_head_attention_forward` as projections and attention, each by its own handler."""
    if rare := rare_argument(*args, **kwargs):
        result: tuple[Tensor, Tensor | None] = function(*args, **kwargs)
        return recorder.blocked(f"multi_head_attention_forward with {rare}", result)  # type: ignore[no-any-return]
    with recorder.interception():
        return multi_head(*args, **kwargs)
