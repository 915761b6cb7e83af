"""The box of a mask's largest component, for whole batches, equals scipy's one mask at a time."""

import numpy as np
import pytest
from naive_rows import mask_box
from scipy import ndimage

from saltern.pipeline.maps import boxes
from saltern.pipeline.maps.boxes import largest_boxes
from saltern.pipeline.maps.discretize import largest_box


@pytest.mark.parametrize("density", [0.02, 0.2, 0.4, 0.55, 0.7, 0.95])
def test_largest_box_equals_scipy(density: float) -> None:
    generator = np.random.default_rng(int(density * 100))
    for height, width in [(1, 1), (1, 40), (17, 1), (8, 8), (23, 31), (64, 64)] * 10:
        mask_HW = generator.random((height, width)) < density
        assert largest_box(mask_HW) == mask_box(mask_HW)


def test_largest_box_on_small_cases() -> None:
    assert largest_box(np.zeros((5, 6), bool)) is None
    assert largest_box(np.ones((5, 6), bool)) == (0, 0, 6, 5)
    corners = np.eye(4, dtype=bool)  # touching corners do not connect; the first of equals counts
    assert largest_box(corners) == (0, 0, 1, 1)
    two = np.zeros((5, 9), bool)
    two[0, 0:3] = two[4, 4:8] = True
    assert largest_box(two) == (4, 4, 8, 5)
    assert largest_box(two.T) == (4, 4, 5, 8)  # a view that is not contiguous


@pytest.mark.parametrize(("together", "many"), [(1, 2**18), (3, 2**18), (32, 2**18), (32, 50), (5, 0)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.5, 0.6, 0.8, 1.0])
def test_boxes_of_a_batch_equal_those_of_each_mask(
    density: float, together: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "_TOGETHER", together)
    monkeypatch.setattr(boxes, "_MANY", many)  # runs, above which the masks are halved
    generator = np.random.default_rng(int(density * 100) + together)
    for height, width in [(1, 1), (1, 9), (9, 1), (5, 8), (24, 31)]:
        mask_BHW = generator.random((7, height, width)) < density
        mask_BHW[3] = False
        expected = [mask_box(mask_HW) or (0, 0, 0, 0) for mask_HW in mask_BHW]
        assert largest_boxes(np.packbits(mask_BHW, axis=2)).tolist() == [list(box) for box in expected]


def test_smooth_masks_spirals_and_combs() -> None:
    """Components that join late: a spiral's arms, and teeth that only the last row connects."""
    generator = np.random.default_rng(3)
    smooth = [ndimage.zoom(generator.random((7, 7)), 8, order=1) > 0.5 for _ in range(40)]
    spiral = np.zeros((56, 56), bool)
    y = x = 0
    lengths = [55, 55, 55, *(n for n in range(53, 0, -2) for _ in range(2))]
    for number, length in enumerate(lengths):
        dy, dx = [(0, 1), (1, 0), (0, -1), (-1, 0)][number % 4]
        for _ in range(length):
            spiral[y, x] = True
            y, x = y + dy, x + dx
    comb = np.zeros((56, 56), bool)
    comb[:, ::2], comb[-1] = True, True
    masks_BHW = np.stack([*smooth, spiral, spiral[::-1], spiral.T, comb, comb[::-1], comb.T, comb[:, ::-1].T])
    expected = [list(mask_box(mask_HW) or (0, 0, 0, 0)) for mask_HW in masks_BHW]
    assert largest_boxes(np.packbits(masks_BHW, axis=2)).tolist() == expected


def test_no_masks_have_no_boxes() -> None:
    assert largest_boxes(np.zeros((0, 4, 1), np.uint8)).shape == (0, 4)
