"""The methods on attention from their definitions: one image, float64, a loop for each sum; slow.

score_K holds the share of each logit in the score: 1 for the class.

Attention is replaced where all libraries look it up, `torch.nn.functional`, so the models run by their own code.
Shape suffixes: M heads, Q queries, S keys, D channels of a head, E of all heads, P patches, K classes.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import vits
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Seen:
    """What a pass of one image showed; every tensor is part of the graph of the logits."""

    logits_K: Tensor
    queries: list[Tensor] = field(default_factory=list)  # q_MQD of each call
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # A_MQS
    outputs: list[Tensor] = field(default_factory=list)  # o_MQD
    tokens: list[Tensor] = field(default_factory=list)  # (T, D), of each block


def run(name: str, x_CHW: Tensor, tokens_TD: Tensor | None = None) -> Seen:
    """Run a family's model, or only what follows its blocks, on given tokens."""
    seen = Seen(torch.empty(0))

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None
        assert len(q) == 1
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        weights, outputs = [], []
        for head in range(q.shape[1]):
            scores_QS = torch.stack([(q[0, head, i] * k[0, head]).sum(-1) * scale for i in range(q.shape[2])])
            exp_QS = torch.exp(scores_QS - scores_QS.max(1, keepdim=True).values)
            weights.append(exp_QS / exp_QS.sum(1, keepdim=True))
        A_MQS = torch.stack(weights)
        for head in range(q.shape[1]):
            outputs.append(sum(A_MQS[head, :, j, None] * v[0, head, j] for j in range(k.shape[2])))
        o_MQD = torch.stack(outputs)
        for found, value in zip((seen.queries, seen.keys, seen.values, seen.weights, seen.outputs),
                                (q[0], k[0], v[0], A_MQS, o_MQD), strict=True):  # fmt: skip
            found.append(value)
        return o_MQD[None]

    model = double(name)
    blocks = model.get_submodule(vits.FAMILIES[name].blocks)
    handles = [block.register_forward_hook(lambda *given: seen.tokens.append(given[-1][0])) for block in blocks]
    with patch.object(F, "scaled_dot_product_attention", attend):
        if tokens_TD is None:
            seen.logits_K = model(x_CHW[None].double().requires_grad_())[0]
        else:
            seen.logits_K = vits.head(name, model, tokens_TD[None])[0]
    for handle in handles:
        handle.remove()
    return seen


_DOUBLE: dict[str, torch.nn.Module] = {}


def double(name: str) -> torch.nn.Module:
    """Return a float64 copy of a family's model; made once."""
    if name not in _DOUBLE:
        _DOUBLE[name] = copy.deepcopy(vits.made(name)).double()
    return _DOUBLE[name]


def _reading(name: str, count: int, block: int = -1) -> Tensor:
    """Return the shares of the queries of a call. Blocks before a pooling by attention are read at their patches."""
    family = vits.FAMILIES[name]
    row_Q = torch.zeros(count, dtype=torch.float64)
    patches = family.read is None or (family.pool and block != -1)
    for query in range(family.prefix, count) if patches else family.read or ():
        row_Q[query] = 1
    return row_Q / row_Q.sum()


def _patches(name: str, row_S: Tensor) -> Tensor:
    return row_S[vits.FAMILIES[name].prefix :].reshape(vits.FAMILIES[name].image[0] // 16, -1).detach()


def attention(name: str, seen: Seen, score_K: Tensor, *, head: int | None = None, block: int = -1) -> Tensor:
    """A of one call, at the class token."""
    A_MQS = seen.weights[block]
    A_QS = sum(A_MQS) / len(A_MQS) if head is None else A_MQS[head]
    return _patches(name, _reading(name, len(A_QS), block) @ A_QS)


def _product(name: str, factors: Sequence[Tensor]) -> Tensor:
    """The product of all factors, the last on the left, read at the class token. A pooling is the last factor."""
    R_SS = torch.eye(factors[0].shape[1], dtype=torch.float64)
    for factor_QS in factors:
        R_SS = factor_QS @ R_SS
    return _patches(name, _reading(name, len(R_SS)) @ R_SS)


def rollout(name: str, seen: Seen, score_K: Tensor, *, first: int = 0) -> Tensor:
    """The product of the normalised (A + 1) / 2."""
    factors = []
    for A_MQS in seen.weights[first:]:
        A_QS = sum(A_MQS) / len(A_MQS)
        if A_QS.shape[0] == A_QS.shape[1]:
            A_QS = (A_QS + torch.eye(len(A_QS), dtype=torch.float64)) / 2
            A_QS = A_QS / A_QS.sum(1, keepdim=True)
        factors.append(A_QS)
    return _product(name, factors)


def chefer(name: str, seen: Seen, score_K: Tensor, *, first: int = 0) -> Tensor:
    """R += mean over heads of (dA * A)+ times R."""
    factors = []
    for A_MQS in seen.weights[first:]:
        (dA_MQS,) = torch.autograd.grad(seen.logits_K @ score_K, A_MQS, retain_graph=True)
        E_QS = sum((dA * A).clamp(min=0) for dA, A in zip(dA_MQS, A_MQS, strict=True)) / len(A_MQS)
        square = E_QS.shape[0] == E_QS.shape[1]
        factors.append(E_QS + torch.eye(len(E_QS), dtype=torch.float64) if square else E_QS)
    return _product(name, factors)


def legrad(name: str, seen: Seen, score_K: Tensor, *, first: int = 0) -> Tensor:
    """The sum over blocks of (ds/dA)+ of the block's own score."""
    pool = vits.FAMILIES[name].pool
    total_S: Tensor | float = 0.0
    for index, tokens_TD in enumerate(seen.tokens[first:], first):
        given_TD = tokens_TD if pool else (sum(tokens_TD) / len(tokens_TD)).expand_as(tokens_TD)
        own = run(name, torch.empty(0), given_TD)
        A_MQS = own.weights[-1] if pool else seen.weights[index]
        (dA_MQS,) = torch.autograd.grad(own.logits_K @ score_K, A_MQS, retain_graph=True)
        total_S = total_S + dA_MQS.clamp(min=0).flatten(0, 1).mean(0)
    assert isinstance(total_S, Tensor)
    return _patches(name, total_S)


def grad_eclip(name: str, seen: Seen, score_K: Tensor, *, block: int = -1) -> Tensor:
    """The sum over channels of gradient, value and cosine of query and key."""
    prefix = vits.FAMILIES[name].prefix
    (gradient,) = torch.autograd.grad(seen.logits_K @ score_K, seen.outputs[block], retain_graph=True)
    q_QE, k_SE, v_SE, g_QE = (
        part.transpose(0, 1).flatten(1)
        for part in (seen.queries[block], seen.keys[block], seen.values[block], gradient)
    )
    total_P = torch.zeros(len(k_SE) - prefix, dtype=torch.float64)
    for query in _reading(name, len(q_QE), block).nonzero().flatten().tolist():
        cosine_P = F.cosine_similarity(q_QE[query, None], k_SE[prefix:], dim=1)
        alike_P = (cosine_P - cosine_P.min()) / (cosine_P.max() - cosine_P.min())
        for channel in range(q_QE.shape[1]):
            total_P = total_P + g_QE[query, channel] * v_SE[prefix:, channel] * alike_P
    return total_P.clamp(min=0).reshape(vits.FAMILIES[name].image[0] // 16, -1).detach()


REFERENCES = {
    "attention": attention, "rollout": rollout, "chefer": chefer, "legrad": legrad, "grad-eclip": grad_eclip
}  # fmt: skip
