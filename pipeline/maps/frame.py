"""Place maps and boxes of the network's input in the original image.

Shape suffixes: R rows, h w a map's grid, H W the network's input, Y X pixels of the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltern.schemas.saliency import Box

Numbers = NDArray[np.floating[Any]]


def to_original(
    box_R4: NDArray[Any], geometry_R4: NDArray[np.float64], size_R2: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Convert boxes from input pixels to the original's pixels: rounded, inside the image, at least one pixel.

    Args:
        box_R4: x0, y0, x1, y1, half-open, pixels of the network's input.
        geometry_R4: scale x, scale y, offset x, offset y (see saltern.schemas.saliency).
        size_R2: height and width of the upright original, pixels.
    """
    box_4R, geometry_4R = box_R4.T, geometry_R4.T
    found_4R = np.empty((4, len(box_R4)), np.int64)
    for axis in (0, 1):
        scale_R, offset_R, size_R = geometry_4R[axis], geometry_4R[2 + axis], size_R2[:, 1 - axis]
        begin_R, end_R = (np.rint(offset_R + scale_R * edge_R).astype(np.int64) for edge_R in box_4R[axis::2])
        begin_R = begin_R.clip(0, size_R - 1)
        found_4R[axis], found_4R[2 + axis] = begin_R, np.minimum(np.maximum(end_R, begin_R + 1), size_R)
    return found_4R.T


def whole_image(height: int, width: int) -> Box:
    """Return the box of the whole image."""
    return 0, 0, width, height


def over_frame(
    map_hw: NDArray[np.float32], input_shape: tuple[int, int], geometry: list[float], height: int, width: int
) -> NDArray[np.float32]:
    """Resample a map at the pixel centres of a (height, width) frame; NaN outside of the input.

    `geometry` places the input in the frame. Interpolation is bilinear, as of `upsample` with align_corners False.
    """
    scale_x, scale_y, offset_x, offset_y = geometry
    # Shares of the input: 0 at its first edge, 1 at its last.
    y_Y = (np.arange(height) + 0.5 - offset_y) / (scale_y * input_shape[0])
    x_X = (np.arange(width) + 0.5 - offset_x) / (scale_x * input_shape[1])
    map_YX = _lines(_lines(map_hw, y_Y).T, x_X).T
    map_YX[(y_Y < 0) | (y_Y >= 1)] = np.nan
    map_YX[:, (x_X < 0) | (x_X >= 1)] = np.nan
    return map_YX


def _lines(map_hw: NDArray[np.float32], share: Numbers) -> NDArray[np.float32]:
    """Interpolate rows of the map at shares of its height, between the two nearest rows."""
    last = len(map_hw) - 1
    at = (share * len(map_hw) - 0.5).clip(0, last)
    before = at.astype(int)
    part = (at - before).astype(np.float32)[:, None]
    rows: NDArray[np.float32] = map_hw[before] * (1 - part) + map_hw[np.minimum(before + 1, last)] * part
    return rows


def lay(
    map_hw: Numbers,
    input_shape: tuple[int, int],
    geometry: Sequence[float],
    height: int,
    width: int,
    *,
    smooth: bool,
) -> "Laid":
    """Lay a map of the network's input (H, W), of any grid, over an original of height x width.

    Args:
        geometry: scale x, scale y, offset x, offset y (saltern.schemas.saliency).
        smooth: interpolate between the cells as `over_frame` does; else each pixel gets its cell's value.
    """
    scale_x, scale_y, offset_x, offset_y = geometry
    y_Y = (np.arange(height) + 0.5 - offset_y) / (scale_y * input_shape[0])
    x_X = (np.arange(width) + 0.5 - offset_x) / (scale_x * input_shape[1])
    y, x = (_Axis.of(share, cells, smooth) for share, cells in zip((y_Y, x_X), map_hw.shape, strict=True))
    return Laid(map_hw.astype(np.float64), y, x)


@dataclass(frozen=True)
class Laid:
    """A map over the pixel centres of its original; 0 outside of the network's crop.

    Sums over boxes need no map of the original's size, as bilinear weights are summed along each axis first.
    """

    map_hw: Numbers
    y: "_Axis"
    x: "_Axis"

    @property
    def frame(self) -> Box:
        """Return the box of the whole original."""
        return whole_image(len(self.y.cell), len(self.x.cell))

    def pixels(self) -> Numbers:
        """Return the value of each pixel of the original, (Y, X). Only of a map that is not interpolated."""
        values_YX: Numbers = self.map_hw[self.y.cell][:, self.x.cell] * np.outer(self.y.weight, self.x.weight)
        return values_YX

    def sum(self, box: Box) -> float:
        """Return the sum over the pixels in the box."""
        x0, y0, x1, y1 = (max(edge, 0) for edge in box)
        return float(self.y.weights(y0, y1) @ self.map_hw @ self.x.weights(x0, x1))


@dataclass(frozen=True)
class _Axis:
    """The cells that give each pixel of a side of the original its value, and their weights: 0 outside of the crop."""

    cells: int
    cell: NDArray[np.intp]
    weight: NDArray[np.float64]
    after: tuple[NDArray[np.intp], NDArray[np.float64]] | None  # the next cells and theirs; of interpolated maps

    @classmethod
    def of(cls, share: Numbers, cells: int, smooth: bool) -> "_Axis":
        """Return the axis of pixels whose centres lie at shares of the input: 0 is its first edge, 1 its last."""
        inside = ((share >= 0) & (share < 1)).astype(np.float64)
        at = (share * cells - 0.5 * smooth).clip(0, cells - 1)
        cell = at.astype(np.intp)
        if not smooth:
            return cls(cells, cell, inside, None)
        part = (at - cell) * inside
        return cls(cells, cell, inside - part, (np.minimum(cell + 1, cells - 1), part))

    def weights(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return the weight of each of the map's cells in the sum of the pixels start..stop."""
        every = [(self.cell, self.weight)] if self.after is None else [(self.cell, self.weight), self.after]
        counted = [np.bincount(cell[start:stop], weight[start:stop], self.cells) for cell, weight in every]
        return sum(counted[1:], counted[0]).astype(np.float64, copy=False)  # counts of no pixels are whole numbers
