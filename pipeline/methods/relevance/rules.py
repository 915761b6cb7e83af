"""Rules of layer-wise relevance propagation: from the relevance of an operation's output to that of its inputs.

Plain functions of tensors, all of one dtype (float32 or float64), under no_grad and without autocast.
There are two conventions for a zero denominator: the published code of Relevance-CAM returns 0, the composites shift
the denominator by 1e-6 away from zero, as zennit does.

Names: x input, W weight, b bias, R relevance of the output, Z what R is divided by, S = R / Z; plus and minus are the
positive and the negative part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

_SHIFT = 1e-6
_GAMMA = 0.25


@dataclass(frozen=True)
class Linear:
    """A linear layer, y = x W^T + b over the last dimension."""

    weight: Tensor
    bias: Tensor | None
    ran: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)  # as in the forward pass, in 16 bits too

    def result(self, x: Tensor) -> Tensor:
        """Return what the forward pass returned: relevance of a result near zero must be divided by the same value."""
        return self.apply(x, self.weight, self.bias) if self.ran is None else self.ran(x)

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the operation's result with other weights."""
        return F.linear(x, W, b)

    def back(self, S: Tensor, W: Tensor, x: Tensor) -> Tensor:
        """Return the transposed operation of S, in the shape of x."""
        return S @ W

    def like(self, x: Tensor) -> Self:
        """Return the layer with weights in the dtype of x."""
        return replace(self, weight=self.weight.to(x.dtype), bias=None if self.bias is None else self.bias.to(x.dtype))

    def folded(self, mean: Tensor, variance: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Self:
        """Return the layer with the following BatchNorm folded in, in float32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        factor = (variance.to(dtype) + eps).rsqrt()
        factor = factor if scale is None else factor * scale.to(dtype)
        bias = -mean.to(dtype) if self.bias is None else self.bias.to(dtype) - mean.to(dtype)
        bias = bias * factor if shift is None else bias * factor + shift.to(dtype)
        weight = self.weight.to(dtype) * factor.view(-1, *(1,) * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=bias, ran=None)


@dataclass(frozen=True)
class Convolution(Linear):
    """A convolution, y = x * W + b over two dimensions."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return F.conv2d(x, W, b, self.stride, self.padding, self.dilation, self.groups)

    def back(self, S: Tensor, W: Tensor, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        result: Tensor = torch.ops.aten.convolution_backward(S, x, W, None, *geometry, (True, False, False))[0]
        return result


LinearRule = Callable[[Linear, Tensor, bool, Tensor], Tensor]  # (layer, x, x is known to be >= 0, R) -> R of x


def divide(R: Tensor, Z: Tensor) -> Tensor:
    """Return R / Z, and 0 where Z = 0. Overwrites Z."""
    return R / Z.masked_fill_(Z == 0, torch.inf)


def divide_shifted(R: Tensor, Z: Tensor) -> Tensor:
    """Return R / (Z +- 1e-6), shifted away from zero."""
    return R / (Z + torch.where(Z < 0, -_SHIFT, _SHIFT))


def _signed(layer: Linear, x: Tensor, W_plus: Tensor, W_minus: Tensor | None, b: Tensor | None) -> Tensor:
    """Return x+ W_plus + x- W_minus + b; W_minus is None if x is known to be >= 0."""
    if W_minus is None:
        return layer.apply(x, W_plus, b)
    return layer.apply(x.clamp(min=0), W_plus, b).add_(layer.apply(x.clamp(max=0), W_minus))


def _signed_back(layer: Linear, x: Tensor, W_plus: Tensor, W_minus: Tensor | None, S: Tensor) -> Tensor:
    """Return x+ (W_plus^T S) + x- (W_minus^T S)."""
    if W_minus is None:
        return layer.back(S, W_plus, x).mul_(x)
    return torch.where(x >= 0, layer.back(S, W_plus, x), layer.back(S, W_minus, x)).mul_(x)


def published(layer: Linear, x: Tensor, nonnegative: bool, R: Tensor) -> Tensor:
    """Relevance-CAM: positive contributions; the bias of a convolution is in both halves of Z, so it counts twice."""
    W_plus, W_minus = layer.weight.clamp(min=0), None if nonnegative else layer.weight.clamp(max=0)
    b = 2 * layer.bias if isinstance(layer, Convolution) and layer.bias is not None else None
    S = divide(R, _signed(layer, x, W_plus, W_minus, b))
    return _signed_back(layer, x, W_plus, W_minus, S)


def alpha1beta0(layer: Linear, x: Tensor, nonnegative: bool, R: Tensor) -> Tensor:
    """Positive contributions and the positive part of the bias (Bach 2015, eq. 60; zennit's AlphaBeta(1, 0), ZPlus)."""
    W_plus, W_minus = layer.weight.clamp(min=0), None if nonnegative else layer.weight.clamp(max=0)
    b = None if layer.bias is None else layer.bias.clamp(min=0)
    S = divide_shifted(R, _signed(layer, x, W_plus, W_minus, b))
    return _signed_back(layer, x, W_plus, W_minus, S)


def epsilon(layer: Linear, x: Tensor, nonnegative: bool, R: Tensor) -> Tensor:
    """All contributions, denominator shifted by 1e-6 (Bach 2015, eq. 58; zennit's Epsilon)."""
    S = divide_shifted(R, layer.result(x))
    return layer.back(S, layer.weight, x).mul_(x)


def gamma(layer: Linear, x: Tensor, nonnegative: bool, R: Tensor) -> Tensor:
    """Contributions with the output's sign count 1.25 times, also for x < 0 (Andeol 2021; zennit's Gamma(0.25))."""
    W, b = layer.weight, layer.bias
    W_plus, W_minus = W + _GAMMA * W.clamp(min=0), W + _GAMMA * W.clamp(max=0)
    b_plus, b_minus = (None, None) if b is None else (b + _GAMMA * b.clamp(min=0), b + _GAMMA * b.clamp(max=0))
    sign = layer.apply(x, W, b)
    result = torch.zeros_like(x)
    # Outputs above zero, then those below, with the roles of the parts exchanged.
    for chosen, W_above, W_below, b_above in (
        (sign > 0, W_plus, W_minus, b_plus),
        (sign < 0, W_minus, W_plus, b_minus),
    ):
        other = None if nonnegative else W_below
        S = divide_shifted(R * chosen, _signed(layer, x, W_above, other, b_above))
        result += _signed_back(layer, x, W_above, other, S)
    return result


def box(layer: Linear, x: Tensor, nonnegative: bool, R: Tensor) -> Tensor:
    """z^B for pixels, between each image's smallest and largest value (Montavon 2017, eq. 14; zennit's ZBox)."""
    W, W_plus, W_minus = layer.weight, layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    axes = tuple(range(1, x.ndim))
    low, high = x.amin(axes, keepdim=True).expand_as(x), x.amax(axes, keepdim=True).expand_as(x)
    S = divide_shifted(R, layer.apply(x, W) - layer.apply(low, W_plus) - layer.apply(high, W_minus))
    return x * layer.back(S, W, x) - low * layer.back(S, W_plus, x) - high * layer.back(S, W_minus, x)


@dataclass(frozen=True)
class Rules:
    """A rule for each kind of operation. Activations and BatchNorm always pass relevance unchanged."""

    convolution: LinearRule
    linear: LinearRule
    first: LinearRule  # for the convolution of the image, or of the scaled image
    safe: bool = False  # division by 0 gives 0 in pools, sums and concatenations; False: the denominator is shifted
    merge: bool = False  # fold BatchNorm into the convolution or linear layer before it
    softmax: Literal["constant", "attnlrp"] = "constant"

    def _divide(self, R: Tensor, Z: Tensor) -> Tensor:
        return (divide if self.safe else divide_shifted)(R, Z)

    def share(
        self,
        operation: Callable[..., Tensor],
        factors: Sequence[Tensor],
        R: Tensor,
        ran: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the relevance of the n factors of an operation that is linear in each: R_x = x * operation^T(R / n Z).

        Of a pool, the values by their share of Z. Of a product of two, each half (Achtibat 2024, proposition 3.3).

        Args:
            ran: the operation as in the forward pass, if it ran in 16 bits.
        """
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in factors]
            Z = operation(*leaves)
        result = Z.detach() if ran is None else ran(*factors)
        S = self._divide(R, len(leaves) * result)
        return tuple(leaf.detach() * part for leaf, part in zip(leaves, torch.autograd.grad(Z, leaves, S), strict=True))

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int, R: Tensor
    ) -> Tensor:
        """Return the epsilon rule of (x - mean) * weight / std + bias, std a constant (Ali 2022, eq. 14).

        Args:
            dims: how many of the last dimensions are normalised.
        """
        over = tuple(range(-dims, 0))
        scale = (x.var(over, correction=0, keepdim=True) + eps).rsqrt()
        scale = scale if weight is None else scale * weight.to(x.dtype)
        Z = (x - x.mean(over, keepdim=True)) * scale
        part = self._divide(R, Z if bias is None else Z + bias.to(x.dtype)) * scale
        return x * (part - part.mean(over, keepdim=True))

    def attention_weights(self, x: Tensor, dim: int, R: Tensor) -> Tensor:
        """Return x_i (R_i - y_i sum_j R_j) for y = softmax(x) (Achtibat 2024, proposition 3.1); 0 where y is 0."""
        y = x.softmax(dim)
        return torch.where(y > 0, x * (R - y * R.sum(dim, keepdim=True)), 0)

    def add(self, x: Tensor, y: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relevance of each addend by its share of the sum; that of a broadcast addend is summed."""
        S = self._divide(R, x + y)
        return (x * S).sum_to_size(x.shape), (y * S).sum_to_size(y.shape)


def composite(name: Literal["alpha1beta0", "epsilon", "gamma", "epsilon-plus", "epsilon-gamma-box"]) -> Rules:
    """Return a composite by name, without merged BatchNorm."""
    return {
        "alpha1beta0": Rules(alpha1beta0, alpha1beta0, box),
        "epsilon": Rules(epsilon, epsilon, epsilon),
        "gamma": Rules(gamma, gamma, gamma),
        "epsilon-plus": Rules(alpha1beta0, epsilon, alpha1beta0),
        "epsilon-gamma-box": Rules(gamma, epsilon, box),
    }[name]


RELEVANCE_CAM = Rules(published, published, box, safe=True)
