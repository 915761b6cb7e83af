"""A slow implementation of relevance by the formulas: one image, float64, one operation of a recorded tape at a time.

It shares no code with `pipeline.methods`. The tape records each call of a torch function with copies of its arguments.
The backward loop reads it in reverse and sums the relevance of every tensor, identified by (id, version).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

PASS = {
    "relu",
    "relu_",
    "hardtanh",
    "hardtanh_",
    "dropout",
    "relu6",
    "silu",
    "gelu",
    "hardswish",
    "leaky_relu",
    "clamp",
}
PASS |= {"mul", "sub", "div", "mul_"}  # by constants
ROUTE = {
    "flatten",
    "view",
    "reshape",
    "pad",
    "transpose",
    "contiguous",
    "unsqueeze",
    "clone",
    "permute",
    "__getitem__",
    "chunk",
}
MEANS = {"avg_pool2d", "adaptive_avg_pool2d", "mean"}


@dataclass
class Call:
    name: str
    function: Any
    args: tuple  # copies
    kwargs: dict
    keys: list  # of the tensors among args, a list's elements one by one
    out: tuple  # key


def key(tensor):
    return id(tensor), tensor._version


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return type(value)(copied(part) for part in value) if isinstance(value, list | tuple) else value


class Tape(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls, self.alive = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = [part for value in args for part in (value if isinstance(value, list | tuple) else [value])]
        tensors = [part for part in flat if isinstance(part, torch.Tensor)]
        before, keys = copied(tuple(args)), [key(tensor) for tensor in tensors]
        out = func(*args, **kwargs)
        name = (resolve_name(func) or "").rpartition(".")[2]
        for index, part in enumerate(out if isinstance(out, tuple) else [out]):
            if isinstance(part, torch.Tensor) and tensors and key(part) != keys[0]:
                self.alive += [part, *tensors]
                function = functools.partial(one_of, func, index) if isinstance(out, tuple) else func
                self.calls.append(Call(name, function, before, kwargs, keys, key(part)))
        return out


def one_of(function, index, *args, **kwargs):
    return function(*args, **kwargs)[index]


def safe(a, b):
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def stabilised(a, b):
    return a / (b + 1e-6 * torch.where(b >= 0, 1.0, -1.0).to(b))


def shares(z_parts, leaves, S):
    """Return the sum of leaf * (its part of the transpose of S)."""
    grads = torch.autograd.grad(sum(z_parts), leaves, S)
    return [leaf.detach() * grad for leaf, grad in zip(leaves, grads, strict=True)]


def leaf(x):
    return x.detach().clone().requires_grad_()


def linear_rule(rule, op, x, W, b, R, is_conv):
    Wp, Wm, zero = W.clamp(min=0), W.clamp(max=0), None
    xp, xm, full = leaf(x.clamp(min=0)), leaf(x.clamp(max=0)), leaf(x)
    if rule == "published":
        b = b if is_conv else zero
        parts = [op(xp, Wp, b), op(xm, Wm, b)]
        return sum(shares(parts, [xp, xm], safe(R, sum(parts).detach())))
    if rule == "alpha1beta0":
        parts = [op(xp, Wp, None if b is None else b.clamp(min=0)), op(xm, Wm, zero)]
        return sum(shares(parts, [xp, xm], stabilised(R, sum(parts).detach())))
    if rule == "epsilon":
        parts = [op(full, W, b)]
        return sum(shares(parts, [full], stabilised(R, parts[0].detach())))
    if rule == "box":
        low, high = leaf(torch.full_like(x, x.min().item())), leaf(torch.full_like(x, x.max().item()))
        parts = [op(full, W, zero), -op(low, Wp, zero), -op(high, Wm, zero)]
        return sum(shares(parts, [full, low, high], stabilised(R, sum(parts).detach())))
    raise KeyError(rule)


def folded(layer, norm):
    W, b = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    _, mean, var = norm.args
    scale, shift = norm.kwargs["weight"], norm.kwargs["bias"]
    factor = scale / torch.sqrt(var + norm.kwargs["eps"])
    b = torch.zeros_like(mean) if b is None else b
    return W * factor.view(-1, *[1] * (W.ndim - 1)), (b - mean) * factor + shift


class Naive:
    """The tape of a float64 model for one image, and the relevance of its tensors.

    Args:
        convolution, linear, first: published, alpha1beta0, epsilon or box.
        published: pools, sums and concatenations follow Relevance-CAM, else zennit.
    """

    def __init__(self, model, x, *, convolution, linear, first=None, published=True, merge=False, layers=()):
        self.rules, self.published, self.merge = (convolution, linear, first), published, merge
        self.x, self.outputs, self.tape = x[None].clone(), {}, Tape()
        hooks = [model.get_submodule(name).register_forward_hook(self.keeper(name)) for name in layers]
        with torch.no_grad(), self.tape:
            self.logits = model(self.x)
        for hook in hooks:
            hook.remove()
        self.made = {call.out: call for call in self.tape.calls}

    def keeper(self, name):
        def keep(module, args, out):
            self.outputs[name] = key(out), out.clone()

        return keep

    def run(self, start_K):
        """Return the relevance of every tensor, by key."""
        self.R = {key(self.logits): start_K.double()[None]}
        for call in reversed(self.tape.calls):
            if call.out in self.R:
                for where, share in self.back(call, self.R[call.out]):
                    self.R[where] = self.R.get(where, 0) + share
        return self

    def map(self, layer):
        where, A = self.outputs[layer]
        weight_K = self.R[where][0].mean((1, 2))
        return (weight_K[:, None, None] * A[0]).sum(0)

    def total(self, layer):
        return float(self.R[self.outputs[layer][0]].sum())

    def pixels(self):
        return self.R[key(self.x)][0].sum(0)

    def back(self, call, R):
        args = call.args
        if call.name in ("conv2d", "linear"):
            return [(call.keys[0], self.affine(call, args[1], args[2] if len(args) > 2 else None, R))]
        if call.name == "batch_norm":
            source = self.made.get(call.keys[0])
            if self.merge and source is not None and source.name in ("conv2d", "linear"):
                return [(source.keys[0], self.affine(source, *folded(source, call), R))]
            return [(call.keys[0], R)]
        if call.name in PASS:
            return [(call.keys[0], R)]
        if call.name in ROUTE or (call.name == "max_pool2d" and not self.published):
            x = leaf(args[0])
            return [(call.keys[0], torch.autograd.grad(call.function(x, *args[1:], **call.kwargs), x, R)[0])]
        if call.name in MEANS or call.name == "max_pool2d":
            return [(call.keys[0], self.pool(call, R))]
        if call.name in ("add", "add_"):
            S = (safe if self.published else stabilised)(R, args[0] + args[1])
            return [(where, x * S) for where, x in zip(call.keys, args[:2], strict=True)]
        if call.name == "cat":
            dim = args[1] if len(args) > 1 else call.kwargs.get("dim", 0)
            parts = R.split([x.shape[dim] for x in args[0]], dim)
            return [
                (where, safe(x * part, x) if self.published else part)
                for where, x, part in zip(call.keys, args[0], parts, strict=True)
            ]
        raise NotImplementedError(call.name)

    def affine(self, call, W, b, R):
        is_conv = call.name == "conv2d"
        on_image = is_conv and call.keys[0] == key(self.x)
        rule = (self.rules[2] if on_image and self.rules[2] else self.rules[0]) if is_conv else self.rules[1]

        def op(x, W, b):
            return F.conv2d(x, W, b, *call.args[3:]) if is_conv else F.linear(x, W, b)

        return linear_rule(rule, op, call.args[0], W, b, R, is_conv)

    def pool(self, call, R):
        x = call.args[0]
        x = leaf(x.clamp(min=0) if self.published and call.name in ("adaptive_avg_pool2d", "mean") else x)
        Z = call.function(x, *call.args[1:], **call.kwargs)
        return shares([Z], [x], (safe if self.published else stabilised)(R, Z.detach()))[0]


def unit(logits_K, target):
    start = torch.full_like(logits_K, -1 / len(logits_K))
    start[target] = 1
    return start


def paper(logits_K, target):
    start = (-logits_K[target] / (len(logits_K) - 1)).repeat(len(logits_K))
    start[target] = logits_K[target]
    return start


def sglrp(logits_K, target):
    y = logits_K.exp() / logits_K.exp().sum()
    start = torch.tensor([-max(1e-8, float(y[target] * share)) for share in y], dtype=torch.float64)
    start[target] = max(1e-8, float(y[target] * (1 - y[target])))
    return start


def logit(logits_K, target):
    start = torch.zeros_like(logits_K)
    start[target] = logits_K[target]
    return start


STARTS = {"unit": unit, "paper": paper, "sglrp": sglrp, "logit": logit}
