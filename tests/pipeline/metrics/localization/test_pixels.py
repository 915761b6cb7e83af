"""PxAP equals clovaai's, and its histograms keep to the bins."""

import math

import numpy as np
import pytest
from naive_wsol import naive_pxap

from saltern.pipeline.metrics.localization.pixels import BINS, PixelPrecision, mask_at_input, pixel_counts


def test_pxap_is_clovaais() -> None:
    rng = np.random.default_rng(0)
    map_BHW = rng.random((30, 9, 11), np.float32)
    mask_BHW = rng.choice([0, 1, 255], (30, 9, 11), p=[0.5, 0.3, 0.2]).astype(np.uint8)
    map_BHW[:20] += mask_BHW[:20] == 1
    map_BHW[20:25] = rng.integers(0, 1001, (5, 9, 11)) / np.float32(1000)  # on the edges of the bins
    map_BHW[25] = 4
    map_BHW[26] = np.nan
    mask_BHW[27], mask_BHW[28] = 0, 255
    counts = pixel_counts(map_BHW, mask_BHW)
    assert counts.shape == (30, 2, BINS)
    assert counts.sum() == (mask_BHW != 255).sum()
    precision = PixelPrecision(draws=200)
    for part in (counts[:7], counts[7:]):
        precision.add(part)
    value, low, high = precision.average_precision()
    assert value == pytest.approx(naive_pxap(map_BHW, mask_BHW), rel=1e-12)
    assert low < value < high
    for map_HW, mask_HW, expected in zip(map_BHW[:5], mask_BHW, counts, strict=False):
        np.testing.assert_array_equal(pixel_counts(map_HW[None], mask_HW[None])[0], expected)


def test_answers_by_hand() -> None:
    mask_HW = np.zeros((4, 4), np.uint8)
    mask_HW[1:3, 1:3] = 1
    for map_HW, expected in (
        (mask_HW.astype(np.float32), 1.0),
        (np.ones((4, 4), np.float32), 4 / 16),  # of a constant map, each pixel is predicted
        (1 - mask_HW.astype(np.float32), 4 / 16),
    ):
        precision = PixelPrecision(draws=10)
        precision.add(pixel_counts(map_HW[None], mask_HW[None]))
        assert precision.average_precision()[0] == pytest.approx(expected)


def test_there_is_no_precision_without_foreground() -> None:
    precision = PixelPrecision(draws=10)
    precision.add(pixel_counts(np.eye(4, dtype=np.float32)[None], np.zeros((1, 4, 4), np.uint8)))
    assert all(math.isnan(value) for value in precision.average_precision())
    assert math.isnan(PixelPrecision(draws=10).average_precision()[0])


def test_maps_of_a_coarse_grid_are_resampled() -> None:
    mask_BHW = np.tile(np.array([[0, 1]], np.uint8), (1, 16, 8))
    counts = pixel_counts(np.array([[[0.0, 1.0]]], np.float32), mask_BHW)
    assert counts.sum() == 16 * 16
    assert (counts[0] > 0).sum() > 4  # values between those of the cells


def test_the_mask_is_looked_up_at_the_inputs_pixel_centres() -> None:
    mask_YX = np.arange(30, dtype=np.uint8).reshape(5, 6)
    assert mask_at_input(mask_YX, (5, 6), (1, 1, 0, 0)).tolist() == mask_YX.tolist()
    assert mask_at_input(mask_YX, (2, 2), (1, 1, 3, 1)).tolist() == [[9, 10], [15, 16]]  # a crop
    assert mask_at_input(mask_YX, (1, 2), (3, 5, 0, 0)).tolist() == [[13, 16]]  # squashed
    # An input that is larger than the image.
    assert mask_at_input(mask_YX, (2, 3), (1, 1, -1, 4)).tolist() == [[255, 24, 25], [255] * 3]
