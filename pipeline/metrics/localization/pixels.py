"""PxAP: the average precision of maps' pixels against pixel masks, pooled over a dataset.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020 (arXiv 2001.07437), with the
conventions of the authors' code, clovaai/wsolevaluation.
Shape suffixes: B maps, h w a map's grid, H W the network's input, Y X pixels of the original, N samples, V bins,
D draws, T the two rows of pixel_counts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.metrics.localization.maxbox import unit_map
from saltern.pipeline.metrics.resampling import DrawnSums, interval
from saltern.pipeline.shards.annotations import FOREGROUND, IGNORED

_EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])  # of the bins, the last but one for exactly 1
BINS = len(_EDGES) - 1


def mask_at_input(
    mask_YX: NDArray[np.uint8], input_shape: tuple[int, int], geometry: Sequence[float]
) -> NDArray[np.uint8]:
    """Return the mask's value at the centre of each pixel of the network's input; IGNORED outside of the image."""
    scale_x, scale_y, offset_x, offset_y = geometry
    y_H = np.floor(offset_y + scale_y * (np.arange(input_shape[0]) + 0.5)).astype(np.int64)
    x_W = np.floor(offset_x + scale_x * (np.arange(input_shape[1]) + 0.5)).astype(np.int64)
    height, width = mask_YX.shape
    mask_HW: NDArray[np.uint8] = mask_YX[y_H.clip(0, height - 1)][:, x_W.clip(0, width - 1)]
    mask_HW[(y_H < 0) | (y_H >= height)] = IGNORED
    mask_HW[:, (x_W < 0) | (x_W >= width)] = IGNORED
    return mask_HW


def pixel_counts(map_Bhw: NDArray[np.float32], mask_BHW: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Count the pixels of each map by value, those of the foreground and those of the background.

    A map is resampled to the network's input (`upsample`) and scaled to [0, 1] by its smallest and largest value; a
    constant map is 0. The bins are [0, .001), [.001, .002), ..., [.999, 1), [1, 2), [2, 3). So each image counts with
    the pixels of the network's input, whatever its size; what the crop leaves out does not count.

    Args:
        map_Bhw: of any grid.
        mask_BHW: as `mask_at_input` returns them.

    Returns:
        (B, 2, BINS).
    """
    counts = np.zeros((len(map_Bhw), 2, BINS), np.uint32)
    for into, map_hw, mask_HW in zip(counts, map_Bhw, mask_BHW, strict=True):
        map_HW = upsample(torch.from_numpy(map_hw[None].astype(np.float32)), mask_HW.shape)[0].numpy()
        known = mask_HW != IGNORED
        unit, foreground = unit_map(map_HW)[known], mask_HW[known] == FOREGROUND
        bin_ = (unit * 1000).astype(np.int64)
        # The product is rounded, as are the edges.
        bin_ += unit >= _EDGES[bin_ + 1]
        bin_ -= unit < _EDGES[bin_]
        into[:] = np.bincount(bin_ + BINS * ~foreground, minlength=2 * BINS).reshape(2, BINS)
    return counts


class PixelPrecision:
    """PxAP from the samples' counts, and its 95 % interval over samples, without keeping the samples."""

    def __init__(self, draws: int = 1000, seed: int = 0):
        self._counts = DrawnSums((2, BINS), draws, seed)

    @property
    def samples(self) -> int:
        """The number of samples that were added."""
        return self._counts.samples

    def add(self, counts_NTV: NDArray[np.uint32]) -> None:
        """Add samples, as `pixel_counts` returns them; for a sample without a map, those of a constant map."""
        self._counts.add(counts_NTV)

    def average_precision(self) -> tuple[float, float, float]:
        """Return PxAP in [0, 1] and the ends of its 95 % interval; NaN without any pixel of the foreground."""
        (value,) = _average_precision(self._counts.sums[None])
        return float(value), *interval(_average_precision(self._counts.drawn_sums))


def _average_precision(counts_DTV: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area below the precision-recall curve, by steps: the sum of precision times the recall's rise."""
    true_DV, false_DV = counts_DTV[:, :, ::-1].cumsum(2).swapaxes(0, 1)
    with np.errstate(invalid="ignore"):
        precision_DV, recall_DV = true_DV / (true_DV + false_DV), true_DV / true_DV[:, -1:]
        area_D: NDArray[np.float64] = np.nansum(precision_DV[:, 1:] * np.diff(recall_DV, axis=1), axis=1)
    return np.where(true_DV[:, -1] > 0, area_D, np.nan)
