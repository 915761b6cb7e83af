"""The metrics equal loops over pixels and answers by hand."""

import random
from itertools import product

import numpy as np
import pytest
from made_run import CROP
from naive_metrics import HEIGHT, WIDTH, filled, naive_f1, naive_iou, pixels, some_box

from saltern.pipeline.maps.frame import lay, over_frame, whole_image
from saltern.pipeline.metrics.localization.boxes import box_f1, centre_box, iou, is_hit, map_f1, unit


def test_iou_and_f1_of_boxes_are_those_of_their_pixels() -> None:
    draw, met = random.Random(0), set()
    for _ in range(60):
        found, true = some_box(draw, 9, 12), [some_box(draw, 9, 12) for _ in range(draw.randint(1, 3))]
        assert iou(found, true) == pytest.approx(max(naive_iou(found, box) for box in true))
        assert box_f1(found, true) == pytest.approx(naive_f1(filled(found, 9, 12), true))
        assert is_hit([found], true) == any(naive_iou(found, box) > 0.5 for box in true)
        met.add(is_hit([found], true))
    assert met == {True, False}


def test_answers_by_hand() -> None:
    assert iou((0, 0, 4, 4), [(2, 2, 6, 6)]) == 4 / 28
    assert iou((0, 0, 4, 4), [(4, 0, 8, 4)]) == 0  # half-open boxes that touch share no pixel
    assert box_f1((0, 0, 4, 4), [(2, 0, 4, 4)]) == 2 * 8 / (16 + 8)
    assert not is_hit([(0, 0, 4, 4)], [(0, 0, 4, 2)])  # exactly one half is not a hit
    assert is_hit([(0, 0, 4, 4)], [(9, 9, 10, 10), (0, 0, 4, 3)])  # the best of several true boxes
    assert not is_hit([], [(0, 0, 4, 4)])  # no mask, no hit


def test_f1_of_a_map_by_hand() -> None:
    laid = lay(np.array([[1.0, 0.5], [0.0, 0.5]]), (2, 2), (1, 1, 0, 0), 2, 2, smooth=True)
    # inside 1.5, P = 1.5 / 2, R = 1.5 / 2
    assert map_f1(laid, [(0, 0, 2, 1)]) == pytest.approx(0.75)
    assert map_f1(laid, [(0, 1, 1, 2), (0, 0, 2, 1)]) == pytest.approx(0.75)
    assert map_f1(laid, [(0, 1, 1, 2)]) == 0
    assert map_f1(lay(np.zeros((2, 2)), (2, 2), (1, 1, 0, 0), 2, 2, smooth=True), [(0, 0, 2, 2)]) == 0


def test_baseline_boxes() -> None:
    assert whole_image(44, 60) == (0, 0, 60, 44)
    assert centre_box(64, 64) == (9, 9, 55, 55)  # the margin 9.37 is rounded
    assert centre_box(100, 300, 0.25) == (75, 25, 225, 75)
    assert centre_box(30, 40, 1) == whole_image(30, 40)
    for height, width in product(range(1, 5), range(1, 5)):
        x0, y0, x1, y1 = centre_box(height, width)
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height


@pytest.mark.parametrize(
    "geometry",
    [
        (1.1, 1.1, 12.1, 3.3),  # a crop inside the frame
        (WIDTH / CROP, HEIGHT / CROP, 0.0, 0.0),  # squashed
        (0.5, 0.7, 0.0, 0.0),  # magnified, cut at the right and at the bottom
        (3.0, 3.0, -5.0, -7.0),  # the input is larger than the frame
    ],
)
@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (CROP, CROP), (1, 1)])
def test_laid_maps_are_those_of_the_reader(geometry: tuple[float, ...], grid: tuple[int, int]) -> None:
    draw = random.Random(1)
    map_hw = np.random.default_rng(2).random(grid, np.float32)
    expected_YX = np.nan_to_num(over_frame(map_hw, (CROP, CROP), list(geometry), HEIGHT, WIDTH))
    laid = lay(map_hw, (CROP, CROP), geometry, HEIGHT, WIDTH, smooth=True)
    assert laid.sum(laid.frame) == pytest.approx(expected_YX.sum(), rel=1e-5)
    for _ in range(5):
        box = some_box(draw)
        expected = sum(float(expected_YX[y, x]) for y, x in pixels(box))
        assert laid.sum(box) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert map_f1(laid, [box]) == pytest.approx(naive_f1(expected_YX, [box]), rel=1e-4, abs=1e-5)


def test_there_is_no_map_outside_of_the_crop() -> None:
    laid = lay(np.ones((2, 2)), (CROP, CROP), (1, 1, 10, 5), HEIGHT, WIDTH, smooth=True)
    assert laid.sum(laid.frame) == pytest.approx(CROP * CROP)
    assert laid.sum((0, 0, 10, HEIGHT)) == 0
    assert map_f1(laid, [(0, 0, 10, HEIGHT)]) == 0
    assert map_f1(laid, [whole_image(HEIGHT, WIDTH)]) == pytest.approx(2 * CROP**2 / (CROP**2 + HEIGHT * WIDTH))


def test_boxes_beyond_the_frame_keep_their_area() -> None:
    laid = lay(np.ones((2, 2)), (4, 4), (1, 1, 0, 0), 4, 4, smooth=True)
    assert map_f1(laid, [(-2, 0, 4, 5)]) == pytest.approx(2 * 16 / (16 + 30))


def test_unit_maps() -> None:
    assert unit(np.array([[-2, 0], [2, 1]], np.float32)).tolist() == [[0, 0.5], [1, 0.75]]
    assert not unit(np.full((2, 2), 7, np.float32)).any()
