"""`F.multi_head_attention_forward` as projections and scaled_dot_product_attention, each of which can be swapped.

Shape suffixes: B batch, M heads, Q queries, S keys, D channels of a head, E of all heads.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saltern.schemas.errors import UserError

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_RARE = ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "static_k", "static_v")
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return what `F.multi_head_attention_forward` does for a batch in eval mode, up to rounding.

    Raises:
        UserError: a rare argument that this form has not.
    """
    rare, given = rare_argument(*args, **kwargs), _arguments(args, kwargs)
    if rare:
        raise UserError(f"the model's nn.MultiheadAttention is called with {rare}, whose attention cannot be shown")
    heads, mask = int(given["num_heads"]), given["attn_mask"]
    if mask is not None:
        # True means masked here, and attended in scaled_dot_product_attention.
        mask = ~mask if not mask.is_floating_point() else mask
        mask = mask if mask.ndim == 2 else mask.unflatten(0, (-1, heads))
    q_BMQD, k_BMSD, v_BMSD = (part.view(*part.shape[:2], heads, -1).permute(1, 2, 0, 3) for part in _projected(given))
    o_BMQD = F.scaled_dot_product_attention(q_BMQD, k_BMSD, v_BMSD, mask)
    output_QBE = F.linear(o_BMQD.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    if not given["need_weights"]:
        return output_QBE, None
    scores_BMQS = (q_BMQD * q_BMQD.shape[-1] ** -0.5) @ k_BMSD.transpose(-2, -1)
    if mask is not None:
        scores_BMQS = scores_BMQS + mask if mask.is_floating_point() else scores_BMQS.masked_fill(~mask, -torch.inf)
    # Of three dimensions: a softmax over the last of four would be seen as attention of its own.
    A_BMQS = scores_BMQS.flatten(0, 1).softmax(-1).unflatten(0, (-1, heads))
    return output_QBE, A_BMQS.mean(1) if given["average_attn_weights"] else A_BMQS


def rare_argument(*args: Any, **kwargs: Any) -> str | None:
    """Return an argument of `F.multi_head_attention_forward` that `multi_head` does not take; None if there is none."""
    given = _arguments(args, kwargs)
    rare = [name for name in _RARE if given[name] is not None and given[name] is not False]
    if rare or given["query"].ndim != 3:
        return rare[0] if rare else "an image without its batch dimension"
    return None


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _projected(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return queries, keys and values before they are split by heads, (Q, B, E) and (S, B, E)."""
    inputs = given["query"], given["key"], given["value"]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    if not given["use_separate_proj_weight"] and inputs[0] is inputs[1] is inputs[2]:
        return F.linear(inputs[0], weight, bias).chunk(3, -1)
    weights = [given[name] for name in _PROJECTIONS] if given["use_separate_proj_weight"] else weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(F.linear(*parts) for parts in zip(inputs, weights, biases, strict=True))
