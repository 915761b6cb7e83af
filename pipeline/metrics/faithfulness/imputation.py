"""Fill removed pixels with weighted means of their neighbours, for a batch at once, on the device.

Rong 2022 (ROAD, 2202.00449), section 4: each removed pixel equals the mean of its eight neighbours, weighed 1/6 (sides)
and 1/12 (corners) and rescaled at the image's border, which is a sparse linear system in the removed pixels. Published
code factorises it image by image. Here the conjugate gradient method solves all of them, with a multigrid V-cycle as
preconditioner: plain Jacobi sweeps, bilinear prolongation, its transpose as restriction, the same stencil on all grids.
A core imputes about 12 images of 224 pixels a second, 5 to 6 times as many as a direct solver.

Everything is a sum of shifted images, which autocast and TF32 leave in float32, and nothing waits for the device.

Shape suffixes: B batch, C H W images; the solver's tensors are on the grid of their level.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ITERATIONS = (
    8  # against a direct solver, at 224 pixels: largest error 1e-3, mean 1e-4 of the pixels' standard deviation
)
_SWEEPS = 3  # on the coarsest grid
_HEIGHT, _WIDTH = 2, 3  # dimensions


class _Level(NamedTuple):
    """One grid of the hierarchy."""

    removed: Tensor  # one channel: 1 for the unknowns; a coarse cell is one if all of its finer cells are
    weight: Tensor  # sum of the weights of the neighbours inside of the image
    jacobi: Tensor  # removed / weight


@torch.no_grad()
def impute(x_BCHW: Tensor, removed_BHW: Tensor, *, iterations: int = ITERATIONS) -> Tensor:
    """Return images whose removed pixels are imputed; the others are equal to the bit.

    Args:
        x_BCHW: images; removed pixels have no influence.
        removed_BHW: bool; at least one pixel of each image remains.
        iterations: of the solver; each divides the error by about 5.
    """
    removed_B1HW = removed_BHW[:, None]
    levels = _levels(removed_B1HW.float())
    found = x_BCHW.float().masked_fill(removed_B1HW, 0)
    residual = -_applied(levels[0], found)
    step = torch.zeros_like(found)
    before = _dot(step, step)
    for _ in range(iterations):
        direction = _vcycle(levels, residual)
        product = _dot(residual, direction)
        step = direction.addcmul_(_ratio(product, before), step)
        image = _applied(levels[0], step)
        length = _ratio(product, _dot(step, image))
        found.addcmul_(length, step)
        residual.addcmul_(length, image, value=-1)
        before = product
    return torch.where(removed_B1HW, found.to(x_BCHW.dtype), x_BCHW)


def _levels(removed: Tensor) -> list[_Level]:
    levels = []
    while True:
        ones = torch.ones(1, 1, *removed.shape[2:], device=removed.device)
        weight = _neighbours(ones).clamp_min(1e-3)  # a grid of one cell has no neighbours
        levels.append(_Level(removed, weight, removed / weight))
        if min(removed.shape[2:]) <= 2:
            return levels
        removed = 1 - F.max_pool2d(_even(_even(1 - removed, _HEIGHT), _WIDTH), 2)


def _vcycle(levels: list[_Level], residual: Tensor) -> Tensor:
    """Return an approximate solution of A z = residual, by a symmetric operator: one sweep before and one after."""
    level, *coarser = levels
    found = residual * level.jacobi  # a sweep from zero
    if coarser:
        left = _halved(_halved(residual - _applied(level, found), _HEIGHT), _WIDTH) * coarser[0].removed
        correction = _doubled(_vcycle(coarser, left), _HEIGHT, residual.shape[_HEIGHT])
        found = found + _doubled(correction, _WIDTH, residual.shape[_WIDTH]) * level.removed
    for _ in range(1 if coarser else _SWEEPS):
        found = _sweep(level, found, residual)
    return found


def _sweep(level: _Level, found: Tensor, residual: Tensor) -> Tensor:
    left = _neighbours(found).sub_(level.weight * found).add_(residual)
    return left.mul_(level.jacobi).add_(found)


def _applied(level: _Level, values: Tensor) -> Tensor:
    """Return A values: what each removed pixel differs by from its neighbours' weighed sum; 0 elsewhere."""
    return (level.weight * values).sub_(_neighbours(values)).mul_(level.removed)


def _neighbours(values: Tensor) -> Tensor:
    """Return the weighed sum of the eight neighbours, zeros outside: (1, 2, 1) x (1, 2, 1) / 12 without its centre."""
    total = F.pad(values, (1, 1, 1, 1))
    for dim in (_HEIGHT, _WIDTH):
        length = values.shape[dim]
        first, middle, last = (total.narrow(dim, at, length) for at in range(3))
        total = torch.add(first, middle, alpha=2).add_(last)
    return total.mul_(1 / 12).sub_(values, alpha=1 / 3)


def _halved(values: Tensor, dim: int) -> Tensor:
    """Restrict values to the coarser grid along one dimension: the transpose of `_doubled`."""
    padded = _repeated(_even(values, dim), dim)
    cells = padded.shape[dim] // 2 - 1
    pairs = padded.reshape(*padded.shape[:dim], cells + 1, 2, *padded.shape[dim + 1 :])
    even, odd = pairs.unbind(dim + 1)  # of the padded values: the first one is the repeated edge
    outer: Tensor = even.narrow(dim, 0, cells) + odd.narrow(dim, 1, cells)
    return (odd.narrow(dim, 0, cells) + even.narrow(dim, 1, cells)).mul_(0.75).add_(outer, alpha=0.25)


def _doubled(values: Tensor, dim: int, length: int) -> Tensor:
    """Interpolate values linearly to `length` finer cells along one dimension."""
    cells, padded = values.shape[dim], _repeated(values, dim)
    near = 0.75 * values
    first, second = (near.add(padded.narrow(dim, at, cells), alpha=0.25) for at in (0, 2))
    return torch.stack([first, second], dim + 1).flatten(dim, dim + 1).narrow(dim, 0, length)


def _repeated(values: Tensor, dim: int) -> Tensor:
    """Return values with both edges of a dimension repeated once."""
    return F.pad(values, (0, 0, 1, 1) if dim == _HEIGHT else (1, 1, 0, 0), mode="replicate")


def _even(values: Tensor, dim: int) -> Tensor:
    """Append zeros to a dimension of odd length."""
    odd = values.shape[dim] % 2
    return F.pad(values, (0, 0, 0, odd) if dim == _HEIGHT else (0, odd, 0, 0)) if odd else values


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((2, 3), keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where the denominator is 0: there the solution is exact."""
    return torch.where(
        denominator == 0, 0, numerator / denominator.where(denominator != 0, torch.ones_like(denominator))
    )
