"""The pointing game equals TorchRay's; energy pointing equals sums over pixels."""

import random

import numpy as np
import pytest
from made_run import CROP
from naive_metrics import HEIGHT, WIDTH, pixels, some_box
from naive_wsol import naive_pointing

from saltern.pipeline.maps.frame import lay, over_frame
from saltern.pipeline.metrics.localization.boxes import disjoint, unit
from saltern.pipeline.metrics.localization.pointing import (
    energy_inside,
    highest_point,
    is_difficult,
    is_pointed_at,
)
from saltern.schemas.saliency import Box

AS_IS = [1.0, 1.0, 0.0, 0.0]


def test_hits_are_torchrays() -> None:
    draw, rng, met = random.Random(0), np.random.default_rng(0), set()
    for _ in range(200):
        height, width = draw.randint(1, 60), draw.randint(1, 60)
        map_hw = rng.permutation(height * width).astype(np.float32).reshape(height, width)
        true = [some_box(draw, height, width) for _ in range(draw.randint(1, 2))]
        shift = draw.choice([0, 0, 30])
        true = [(x0 + shift, y0, x1 + shift, y1) for x0, y0, x1, y1 in true]  # some beyond the image
        point = highest_point(map_hw, (height, width), AS_IS, height, width)
        y, x = np.unravel_index(map_hw.argmax(), map_hw.shape)
        assert point == (x, y)
        hit = is_pointed_at(point, true, height, width)
        assert hit == naive_pointing(map_hw, true)
        met.add(hit)
    assert met == {True, False}


@pytest.mark.parametrize("grid", [(3, 4), (CROP, CROP), (1, 1)])
def test_points_lie_in_the_original(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for geometry in ([1.1, 1.1, 12.1, 3.3], [WIDTH / CROP, HEIGHT / CROP, 0.0, 0.0], [3.0, 3.0, -5.0, -7.0]):
        map_hw = rng.random(grid, np.float32)
        point = highest_point(map_hw, (CROP, CROP), geometry, HEIGHT, WIDTH)
        assert point is not None
        over_YX = over_frame(map_hw, (CROP, CROP), geometry, HEIGHT, WIDTH)
        assert over_YX[point[1], point[0]] == pytest.approx(np.nanmax(over_YX), rel=1e-5)


def test_equal_maxima_point_to_the_first() -> None:
    map_hw = np.zeros((6, 8), np.float32)
    map_hw[2, 5] = map_hw[2, 3] = map_hw[4, 1] = 1
    assert highest_point(map_hw, (6, 8), AS_IS, 6, 8) == (3, 2)
    flat = np.full((2, 2), 0.1, np.float32)
    assert highest_point(flat, (4, 4), [1.0, 1.0, 10.0, 5.0], 30, 40) == (10, 5)  # the crop's first pixel
    assert highest_point(flat, (4, 4), [0.05, 0.05, 2.6, 2.6], 30, 40) is None  # no pixel's centre in the crop
    assert not is_pointed_at(None, [(0, 0, 9, 9)], 30, 40)


def test_the_tolerance_ends_before_15_pixels() -> None:
    box = (100, 100, 120, 120)
    for point, hit in (((86, 110), True), ((85, 110), False), ((133, 110), True), ((134, 110), False)):
        assert is_pointed_at(point, [box], 200, 200) == hit
    for point, hit in (((89, 90), True), ((88, 91), False)):  # corners: 11, 10 and 12, 9 pixels away
        assert is_pointed_at(point, [box], 200, 200) == hit
    assert is_pointed_at((10, 10), [box, (0, 0, 5, 5)], 200, 200)  # any of several
    assert not is_pointed_at((199, 0), [(205, 0, 210, 5)], 200, 200)  # no pixel of the box is in the image


def test_difficult_samples() -> None:
    small, half = (0, 0, 10, 9), (0, 0, 10, 20)
    assert is_difficult([small], 1, 20, 20) is True
    assert is_difficult([small], 0, 20, 20) is False
    assert is_difficult([half], 3, 20, 20) is False
    assert is_difficult([(0, 0, 10, 10)], 1, 20, 20) is False  # exactly a quarter
    assert is_difficult([small, (0, 0, 10, 9)], 1, 20, 20) is True  # covered pixels count once
    assert is_difficult([(-50, 0, 10, 9)], 1, 20, 20) is True  # those of the image
    assert is_difficult([small], None, 20, 20) is None


def test_disjoint_boxes_cover_the_same_pixels() -> None:
    draw = random.Random(2)
    for _ in range(100):
        boxes = [some_box(draw, 12, 9) for _ in range(draw.randint(0, 5))]
        found = disjoint(boxes)
        assert sum(len(pixels(box)) for box in found) == len(set[tuple[int, int]]().union(*map(pixels, found)))
        assert set().union(*map(pixels, found)) == set().union(*map(pixels, boxes))


@pytest.mark.parametrize("geometry", [(1.1, 1.1, 12.1, 3.3), (3.0, 3.0, -5.0, -7.0)])
def test_energy_is_that_of_the_pixels_in_the_boxes(geometry: tuple[float, ...]) -> None:
    draw, map_hw = random.Random(3), np.random.default_rng(3).random((4, 5), np.float32)
    over_YX = np.nan_to_num(over_frame(unit(map_hw), (CROP, CROP), list(geometry), HEIGHT, WIDTH))
    laid = lay(unit(map_hw), (CROP, CROP), geometry, HEIGHT, WIDTH, smooth=True)
    for _ in range(20):
        true: list[Box] = [some_box(draw) for _ in range(draw.randint(1, 3))]
        inside = sum(float(over_YX[y, x]) for y, x in set().union(*map(pixels, true)))
        assert energy_inside(laid, true) == pytest.approx(inside / over_YX.sum(), rel=1e-4)


def test_energy_by_hand() -> None:
    laid = lay(np.array([[3.0, 1.0], [0.0, 0.0]]), (2, 2), AS_IS, 2, 2, smooth=True)
    assert energy_inside(laid, [(0, 0, 1, 1)]) == pytest.approx(0.75)
    assert energy_inside(laid, [(0, 0, 1, 2), (0, 0, 2, 1)]) == pytest.approx(1)  # the common pixel counts once
    assert energy_inside(laid, [(0, 1, 2, 2)]) == 0
    assert energy_inside(lay(np.zeros((2, 2)), (2, 2), AS_IS, 2, 2, smooth=True), [(0, 0, 2, 2)]) == 0
