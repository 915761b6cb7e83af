"""How relevance is recorded for attention. Handlers are as in `layers`.

Shape suffixes: L tokens, N batch, H heads, D channels of a head.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.pipeline.methods.relevance.marks import aligned, carries, hold, set_mark, shared_marks
from saltern.pipeline.methods.relevance.products import gate
from saltern.pipeline.methods.relevance.steps import Recorder

_RARE = ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "static_k", "static_v", "training")
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


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
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    rare = [name for name in _RARE if given.get(name) is not None and given[name] is not False]
    if rare or given["query"].ndim != 3:
        what = f"multi_head_attention_forward with {rare[0] if rare else 'one sample alone'}"
        result: tuple[Tensor, Tensor | None] = recorder.blocked(what, function(*args, **kwargs))
        return result
    with recorder.interception():
        heads = int(given["num_heads"])
        query_NHLD, key_NHLD, value_NHLD = (
            part.reshape(*part.shape[:2], heads, -1).permute(1, 2, 0, 3) for part in _projected(given)
        )
        mask = given.get("attn_mask")
        if mask is not None:
            # True means masked here, and attended in scaled_dot_product_attention.
            mask = ~mask if mask.dtype == torch.bool else mask
            mask = mask if mask.ndim == 2 else mask.view(-1, heads, *mask.shape[1:])
        causal = bool(given.get("is_causal")) and mask is None
        out_NHLD = F.scaled_dot_product_attention(query_NHLD, key_NHLD, value_NHLD, mask, is_causal=causal)
        out = F.linear(out_NHLD.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
        if not given.get("need_weights", True):
            return out, None
        weights = _scores(query_NHLD, key_NHLD, mask, causal, None).softmax(-1)
        return out, weights.mean(1) if given.get("average_attn_weights", True) else weights


def _projected(given: dict[str, Any]) -> tuple[Tensor, ...]:
    inputs = given["query"], given["key"], given["value"]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    if not given.get("use_separate_proj_weight") and inputs[0] is inputs[1] is inputs[2]:
        return F.linear(inputs[0], weight, bias).chunk(3, -1)
    separate = given.get("use_separate_proj_weight")
    weights = [given[name] for name in _PROJECTIONS] if separate else weight.chunk(3)
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return tuple(F.linear(x, W, b) for x, W, b in zip(inputs, weights, biases, strict=True))
