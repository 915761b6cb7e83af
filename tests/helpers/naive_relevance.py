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
PASS |= {"sub", "div", "normalize", "rms_norm", "tanh"}  # by constants
GATES = {"softmax", "sigmoid", "hardsigmoid", "norm"}
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
    "roll",
    "unbind",
    "expand",
    "swapaxes",
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


def normalised(x, shape, weight, bias, eps, R, divide):
    """The epsilon rule of LayerNorm: of each token's vector, a matrix diag(weight / std) (1 - 1/n) and a bias."""
    n = x.shape[-1]
    assert tuple(shape) == (n,)
    rows, R_rows = x.reshape(-1, n), R.reshape(-1, n)
    std = torch.sqrt(((rows - rows.mean(1, keepdim=True)) ** 2).mean(1) + eps)
    found = []
    for row, sigma, R_row in zip(rows, std, R_rows, strict=True):
        matrix = (weight / sigma)[:, None] * (torch.eye(n).to(x) - 1 / n)
        found.append(row * (matrix.T @ divide(R_row, matrix @ row + bias)))
    return torch.stack(found).view_as(x)


def attended(q, k, v, mask, R, softmax, divide):
    """Relevance of the queries, keys and values of one head, (tokens, channels) each."""
    product = q @ k.T
    scores = product * q.shape[1] ** -0.5 + (0 if mask is None else mask)
    A = torch.exp(scores - scores.amax(1, keepdim=True))
    A = A / A.sum(1, keepdim=True)
    if softmax == "constant":
        return torch.zeros_like(q), torch.zeros_like(k), v * (A.T @ divide(R, A @ v))
    S = divide(R, 2 * (A @ v))
    R_A, R_v = A * (S @ v.T), v * (A.T @ S)
    R_scores = scores * (R_A - A * R_A.sum(1, keepdim=True))
    if mask is not None:
        R_scores = (scores - mask) * divide(R_scores, scores)
    S = divide(R_scores, 2 * product)
    return q * (S @ k), k * (S.T @ q), R_v


class Naive:
    """The tape of a float64 model for one image, and the relevance of its tensors.

    Args:
        convolution, linear, first: published, alpha1beta0, epsilon or box.
        published: pools, sums and concatenations follow Relevance-CAM, else zennit.
        softmax: constant or attnlrp.
    """

    def __init__(
        self, model, x, *, convolution, linear, first=None, published=True, merge=False, layers=(), softmax="constant"
    ):
        self.rules, self.published, self.merge = (convolution, linear, first), published, merge
        self.softmax, self.divide = softmax, safe if published else stabilised
        self.x, self.outputs, self.tape = x[None].clone(), {}, Tape()
        hooks = [model.get_submodule(name).register_forward_hook(self.keeper(name)) for name in layers]
        with torch.no_grad(), self.tape:
            self.logits = model(self.x)
        for hook in hooks:
            hook.remove()
        self.made = {call.out: call for call in self.tape.calls}
        self.moving = {key(self.x)}  # tensors that depend on the image
        for call in self.tape.calls:
            if not self.moving.isdisjoint(call.keys) and call.name != "new_zeros":
                self.moving.add(call.out)

    def keeper(self, name):
        def keep(module, args, out):
            self.outputs[name] = key(out), out.clone()

        return keep

    def run(self, start_K):
        """Return the relevance of every tensor, by key."""
        self.R = {key(self.logits): start_K.double()[None]}
        for call in reversed(self.tape.calls):
            if call.out in self.R and call.out in self.moving:
                for where, share in self.back(call, self.R[call.out]):
                    self.R[where] = self.R.get(where, 0) + share
        return self

    def map(self, layer, grid=lambda A_1KHW: A_1KHW):
        where, A = self.outputs[layer]
        A_KHW, R_KHW = grid(A)[0], grid(self.R[where])[0]
        return (R_KHW.mean((1, 2))[:, None, None] * A_KHW).sum(0)

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
        if call.name in ("mul", "mul_", "matmul", "einsum"):
            return self.product(call, R)
        if call.name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            return self.attention(call, R)
        return self.sums(call, R)

    def sums(self, call, R):
        args, kwargs = call.args, call.kwargs
        if call.name in ("add", "add_"):
            if len(call.keys) == 1:  # a number
                return [(call.keys[0], R)]
            S = self.divide(R, args[0] + args[1])
            return [(where, (x * S).sum_to_size(x.shape)) for where, x in zip(call.keys, args[:2], strict=True)]
        if call.name == "softmax":
            y = torch.exp(args[0]) / torch.exp(args[0]).sum(-1, keepdim=True)
            return [(call.keys[0], args[0] * (R - y * R.sum(-1, keepdim=True)))]
        if call.name == "layer_norm":
            parts = (kwargs[name] for name in ("weight", "bias", "eps"))
            return [(call.keys[0], normalised(args[0], args[1], *parts, R, self.divide))]
        if call.name == "cat":
            dim = args[1] if len(args) > 1 else call.kwargs.get("dim", 0)
            parts = R.split([x.shape[dim] for x in args[0]], dim)
            return [
                (where, safe(x * part, x) if self.published else part)
                for where, x, part in zip(call.keys, args[0], parts, strict=True)
            ]
        raise NotImplementedError(call.name)

    def gate(self, where):
        call = self.made.get(where)
        if call is None or (call.name not in GATES and call.name not in ROUTE and call.name != "dropout"):
            return False
        return (
            self.gate(call.keys[0]) if call.name not in GATES else self.softmax == "constant" or call.name != "softmax"
        )

    def product(self, call, R):
        factors = [value for value in call.args if not isinstance(value, str)]
        if len(call.keys) < 2:  # by a number
            return [(call.keys[0], R)]
        chosen = [index for index, where in enumerate(call.keys) if where in self.moving and not self.gate(where)]
        leaves = [leaf(value) for value in factors]
        Z = call.function(*([call.args[0]] if call.name == "einsum" else []), *leaves)
        S = self.divide(R, len(chosen) * Z.detach())
        if call.name.startswith("mul"):  # elements of each are spread by broadcasting
            return [(call.keys[i], (R / len(chosen)).sum_to_size(factors[i].shape)) for i in chosen]
        grads = torch.autograd.grad(Z, leaves, S)
        return [(call.keys[i], factors[i] * grads[i]) for i in chosen]

    def attention(self, call, R):
        args = call.args
        if call.name == "scaled_dot_product_attention":
            mask = call.kwargs.get("attn_mask")
            mask = None if mask is None else mask.expand(*args[0].shape[:-1], args[1].shape[-2]).flatten(0, 1)
            heads = [value.flatten(0, 1) for value in (*args[:3], R)]
            found = [
                attended(q, k, v, None if mask is None else mask[index], R_head, self.softmax, self.divide)
                for index, (q, k, v, R_head) in enumerate(zip(*heads, strict=True))
            ]
            parts = [
                torch.stack(part).view_as(value) for part, value in zip(zip(*found, strict=True), args, strict=False)
            ]
            return list(zip(call.keys, parts, strict=False))
        x, W, b, count = args[0][:, 0], args[5], args[6], args[4]  # self-attention of one image
        projected = F.linear(x, W, b)
        heads = list(zip(*[part.chunk(count, 1) for part in projected.chunk(3, 1)], strict=True))
        out = torch.cat([torch.softmax(q @ k.T * q.shape[1] ** -0.5, 1) @ v for q, k, v in heads], 1)
        R_out = linear_rule(self.rules[1], F.linear, out, args[11], args[12], R[:, 0], False)
        parts = R_out.chunk(count, 1)
        found = [
            attended(*head, None, part, self.softmax, self.divide) for head, part in zip(heads, parts, strict=True)
        ]
        R_projected = torch.cat([part for kind in zip(*found, strict=True) for part in kind], 1)
        return [(call.keys[0], linear_rule(self.rules[1], F.linear, x, W, b, R_projected, False)[:, None])]

    def affine(self, call, W, b, R):
        is_conv = call.name == "conv2d"
        on_image = is_conv and call.keys[0] == key(self.x)
        rule = (self.rules[2] if on_image and self.rules[2] else self.rules[0]) if is_conv else self.rules[1]

        def op(x, W, b):
            return F.conv2d(x, W, b, *call.args[3:]) if is_conv else F.linear(x, W, b)

        return linear_rule(rule, op, call.args[0], W, b, R, is_conv)

    def pool(self, call, R):
        x = leaf(call.args[0])
        Z = call.function(x, *call.args[1:], **call.kwargs)
        return shares([Z], [x], self.divide(R, Z.detach()))[0]
