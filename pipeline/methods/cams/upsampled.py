"""sum_k (upsampled mean of A_k) * (upsampled mean of G_k), without ever holding an upsampled channel.

Bilinear upsampling is linear: a pixel takes cells c with weights u_c, over all sizes at once. Hence the sum over k is
sum_{c,d} u_c u_d <A_c, G_d>, and <A_c, G_d> is one matrix product over the channels. It is made for tiles of the
output, for each of which only the cells around it count. For 8 sizes, K = 2048 and 224 pixels that is a hundredth of
the 1.6 GB which the upsampled channels of A and G would take, and a few percent of their arithmetic.

Shape suffixes: B batch, K channels, h w a grid, N cells of all grids, T tiles, P pixels of a tile, C cells of a tile.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]

_TILES = (4, 8, 16, 32, 64)  # sides to choose from, pixels
_BLOCK = 2**25  # values gathered at once


@dataclass(frozen=True)
class Plan:
    """The cells of each tile of the output and their weights, for given grids, output size and channels."""

    size: Grid  # of the output
    tile: int  # side
    index_TC: Tensor  # int64, cells of a tile among all N
    weight_TPC: Tensor  # float32, of a cell in a pixel; bilinear, align_corners False


def plan(grids: Sequence[Grid], size: Grid, channels: int, device: torch.device) -> Plan:
    """Return the tiling that takes the fewest multiplications.

    Args:
        grids: (h, w) of each map that is upsampled.
        size: of the output.
    """
    axes = {tile: _axes(grids, size, tile) for tile in _TILES if tile <= max(_TILES[0], *size)}

    def cost(tile: int) -> int:
        cells = sum(row_YR.shape[1] * column_XS.shape[1] for (row_YR, _), (column_XS, _) in axes[tile])
        return -(-size[0] // tile) * -(-size[1] // tile) * cells * cells * (channels + tile * tile)

    best = min(axes, key=cost)
    return _assemble(axes[best], grids, size, best, device)


_Axis = tuple[Tensor, Tensor]  # cells of each tile (tiles, n), and their weights in its pixels (tiles, tile, n)


def _axes(grids: Sequence[Grid], size: Grid, tile: int) -> list[tuple[_Axis, _Axis]]:
    return [(_axis(height, size[0], tile), _axis(width, size[1], tile)) for height, width in grids]


def _assemble(
    axes: list[tuple[_Axis, _Axis]], grids: Sequence[Grid], size: Grid, tile: int, device: torch.device
) -> Plan:
    index, weight, offset = [], [], 0
    for ((row_YR, y_YpR), (column_XS, x_XqS)), (height, width) in zip(axes, grids, strict=True):
        cell_YXRS = offset + width * row_YR[:, None, :, None] + column_XS[None, :, None, :]
        index.append(cell_YXRS.flatten(2).flatten(0, 1))
        weight.append(torch.einsum("ypr,xqs->yxpqrs", y_YpR, x_XqS).flatten(4).flatten(2, 3).flatten(0, 1))
        offset += height * width
    return Plan(size, tile, torch.cat(index, 1).to(device), torch.cat(weight, 2).to(device))


def _axis(cells: int, pixels: int, tile: int) -> _Axis:
    weight_PC = F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear")[0].T
    tiles = -(-pixels // tile)
    weight_TPC = F.pad(weight_PC, (0, 0, 0, tiles * tile - pixels)).view(tiles, tile, cells)
    used_TC = (weight_TPC != 0).any(1).int()
    first_T, last_T = used_TC.argmax(1), cells - 1 - used_TC.flip(1).argmax(1)
    span = int((last_T - first_T).max()) + 1
    index_TC = first_T.clamp(max=cells - span)[:, None] + torch.arange(span)
    return index_TC, weight_TPC.gather(2, index_TC[:, None].expand(-1, tile, -1))


def product(A_BNK: Tensor, G_BNK: Tensor, how: Plan) -> Tensor:
    """Return sum_k up(A_k) * up(G_k), map_BHW float32.

    Args:
        A_BNK, G_BNK: float32, all cells of all grids, row by row, in the order of the plan.
    """
    batch, _, channels = A_BNK.shape
    step = max(1, _BLOCK // (batch * how.index_TC.shape[1] * channels))
    parts = []
    for index_tC, weight_tPC in zip(torch.split(how.index_TC, step), torch.split(how.weight_TPC, step), strict=True):
        gram_BtCC = A_BNK[:, index_tC] @ G_BNK[:, index_tC].mT
        parts.append(((weight_tPC @ gram_BtCC) * weight_tPC).sum(3))
    (height, width), tile = how.size, how.tile
    map_BYXpq = torch.cat(parts, 1).view(batch, -(-height // tile), -1, tile, tile)
    return map_BYXpq.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
