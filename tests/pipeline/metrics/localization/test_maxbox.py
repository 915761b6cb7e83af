"""The hits of MaxBoxAcc and V2 equal those of clovaai's loop over thresholds, bit by bit."""

import random

import cv2
import numpy as np
import pytest
from naive_metrics import some_box
from naive_wsol import THRESHOLDS, naive_hits, normalised
from numpy.typing import NDArray

from saltern.pipeline.metrics.localization import areas, levels, maxbox
from saltern.pipeline.metrics.localization.accuracy import levels_of, threshold_of
from saltern.pipeline.metrics.localization.basins import bright_and_dark
from saltern.pipeline.metrics.localization.levels import parts_of
from saltern.pipeline.metrics.localization.maxbox import BYTES, box_hits, eight_bits
from saltern.schemas.saliency import Box

Maps = NDArray[np.float32]
FIRST = [threshold_of(level) for level in range(255)]  # the other thresholds cut at the same levels


def noise(rng: np.random.Generator, batch: int, height: int, width: int) -> Maps:
    return rng.random((batch, height, width), np.float32)


def ties(rng: np.random.Generator, batch: int, height: int, width: int) -> Maps:
    return rng.integers(0, 4, (batch, height, width)).astype(np.float32)


def masks(rng: np.random.Generator, batch: int, height: int, width: int) -> Maps:
    return (rng.random((batch, height, width)) > 0.4).astype(np.float32)


def smooth(rng: np.random.Generator, batch: int, height: int, width: int) -> Maps:
    small = rng.standard_normal((batch, 4, 5)).astype(np.float32)
    return np.stack([cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in small])


def clipped(rng: np.random.Generator, batch: int, height: int, width: int) -> Maps:
    return smooth(rng, batch, height, width).clip(0)


def hits(map_BHW: Maps, true: list[list[Box]]) -> NDArray[np.bool_]:
    """Return the hits of maps that lie over their originals as they are: (B, 4, 255)."""
    batch, *shape = map_BHW.shape
    geometry_B4, size_B2 = np.tile([1.0, 1, 0, 0], (batch, 1)), np.tile(shape, (batch, 1)).astype(np.int32)
    packed = box_hits(map_BHW, (shape[0], shape[1]), geometry_B4, size_B2, true)
    assert packed.shape == (batch, 4, BYTES)
    assert packed.dtype == np.uint8
    return np.unpackbits(packed, axis=2, count=255).view(np.bool_)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [noise, ties, masks, smooth, clipped])
def test_hits_are_those_of_clovaais_loop(kind: object) -> None:
    assert callable(kind)
    rng, draw, met = np.random.default_rng(0), random.Random(0), set[bool]()
    for height, width in ((1, 1), (1, 9), (7, 2), (5, 6), (11, 14), (17, 13)):
        map_BHW = kind(rng, 3, height, width)
        true = [[some_box(draw, height, width) for _ in range(draw.randint(1, 3))] for _ in map_BHW]
        for found, map_HW, boxes in zip(hits(map_BHW, true), map_BHW, true, strict=True):
            expected = np.array(naive_hits(map_HW, boxes, FIRST))
            np.testing.assert_array_equal(found, expected)
            met |= set(expected[0].tolist())
    assert met == {True, False}


def test_levels_are_those_of_all_thresholds() -> None:
    map_HW = smooth(np.random.default_rng(3), 1, 12, 15)
    ((x0, y0, x1, y1),) = [(3, 2, 13, 10)]
    found = hits(map_HW, [[(x0, y0, x1, y1)]])[0]
    np.testing.assert_array_equal(found[:, levels_of(THRESHOLDS)], np.array(naive_hits(map_HW[0], [(x0, y0, x1, y1)])))
    assert set(levels_of(THRESHOLDS)) == set(range(255))


@pytest.mark.slow
def test_hits_do_not_depend_on_what_is_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    map_BHW = np.random.default_rng(4).integers(0, 9, (4, 15, 12)).astype(np.float32) * 28
    true: list[list[Box]] = [[(x, y, x + 2, y + 2) for x in range(10) for y in range(0, 13, 3)]] * 4
    usual = hits(map_BHW, true)
    assert (usual[:, 0] != usual[:, 2]).any()  # areas decide
    for module, name in ((maxbox, "_MANY"), (levels, "FEW"), (areas, "FEW")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 0)
            np.testing.assert_array_equal(hits(map_BHW, true), usual)


@pytest.mark.parametrize("kind", [ties, smooth, clipped])
def test_areas_of_some_maps_are_those_of_their_contours(kind: object) -> None:
    assert callable(kind)
    map_BHW = eight_bits(kind(np.random.default_rng(6), 4, 19, 16))
    bright, _ = bright_and_dark(map_BHW)
    parts, some_B = parts_of(bright), np.array([True, False, True, True])
    shown = some_B[parts.map]
    found = dict.fromkeys(zip(parts.map[shown].tolist(), parts.level[shown].tolist(), strict=True), 0.0)
    for key, area in zip(
        zip(parts.map[shown], parts.level[shown], strict=True), areas.areas_of(bright, some_B), strict=True
    ):
        found[int(key[0]), int(key[1])] += area
    assert {number for number, _ in found} == {0, 2, 3}
    for (number, level), area in found.items():
        mask_HW = (map_BHW[number] > level).astype(np.uint8)
        contours, tree = cv2.findContours(mask_HW, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        # OpenCV traces a hole through the pixels around it.
        signs = [1 if parent < 0 else -1 for parent in tree[0, :, 3]]
        assert area == sum(sign * cv2.contourArea(each) for sign, each in zip(signs, contours, strict=True))


@pytest.mark.slow
def test_hits_on_maps_of_a_networks_input() -> None:
    rng, draw = np.random.default_rng(5), random.Random(5)
    for map_BHW in (clipped(rng, 3, 224, 224), smooth(rng, 3, 224, 224), noise(rng, 1, 64, 48)):
        true = [[some_box(draw, *map_BHW.shape[1:])] for _ in map_BHW]
        for found, map_HW, boxes in zip(hits(map_BHW, true), map_BHW, true, strict=True):
            np.testing.assert_array_equal(found, np.array(naive_hits(map_HW, boxes, FIRST)))


def test_answers_by_hand() -> None:
    map_HW = np.zeros((10, 10), np.float32)
    map_HW[2:5, 3:8] = 1
    # The found box is one pixel larger to the right and to the bottom: 6 x 4 pixels for 5 x 3.
    perfect, tight, other = hits(np.stack([map_HW] * 3), [[(3, 2, 9, 6)], [(3, 2, 8, 5)], [(0, 6, 9, 10)]])
    assert perfect.all()
    assert tight[[0, 1, 2]].all()  # 15 / 24 is a hit at .5, not at .7
    assert not tight[3].any()
    assert not other.any()


def test_exactly_one_half_is_a_hit() -> None:
    map_HW = np.zeros((1, 9, 9), np.float32)
    map_HW[0, 0:3, 0:3] = 1  # 4 x 4 pixels with the larger edges
    assert hits(map_HW, [[(0, 0, 4, 8)]])[0, 0].all()
    assert not hits(map_HW, [[(0, 0, 4, 9)]])[0, 0].any()


def test_only_v2_looks_at_the_smaller_of_two_parts_and_at_outlines_of_holes() -> None:
    map_HW = np.zeros((1, 20, 20), np.float32)
    map_HW[0, 1:4, 1:4] = 1  # the smaller part, found as 1, 1, 5, 5
    map_HW[0, 6:19, 6:19] = 1
    map_HW[0, 9:14, 9:14] = 0  # its outline is found as 8, 8, 16, 16
    for box in ((1, 1, 5, 5), (8, 8, 16, 16)):
        found = hits(map_HW, [[box]])[0]
        assert not found[0].any()
        assert found[1:].all()
    assert hits(map_HW, [[(6, 6, 20, 20)]]).all()


def test_the_first_contour_of_opencv_counts_among_equals() -> None:
    map_HW = np.zeros((1, 9, 20), np.float32)
    map_HW[0, 2:5, 2:5] = map_HW[0, 2:5, 12:15] = 1
    left, right = ((2, 2, 6, 6), (12, 2, 16, 6))
    found = [hits(map_HW, [[box]])[0, 0].all() for box in (left, right)]
    assert found == [naive_hits(map_HW[0], [box], [0.5])[0] == [True] for box in (left, right)]
    assert sorted(found) == [False, True]


def test_a_constant_map_finds_the_first_pixel() -> None:
    for value in (0.0, 7.0, np.nan, np.inf):
        map_HW = np.full((1, 6, 6), value, np.float32)
        assert hits(map_HW, [[(0, 0, 1, 1)]]).all()
        assert not hits(map_HW, [[(0, 0, 6, 6)]]).any()


def test_eight_bits_are_clovaais() -> None:
    map_BHW = smooth(np.random.default_rng(8), 5, 30, 31)
    map_BHW[0] *= 1e-30
    map_BHW[1] *= 1e30
    map_BHW[2] = 3
    expected = [(normalised(map_HW) * 255).astype(np.uint8) for map_HW in map_BHW]
    np.testing.assert_array_equal(eight_bits(map_BHW), expected)


def test_boxes_are_compared_in_the_original() -> None:
    map_HW = np.zeros((8, 8), np.float32)
    map_HW[2:5, 1:4] = 1  # found as 1, 2, 5, 6
    geometry, size = [[2.5, 3.0, 10.0, -4.0]], np.array([[40, 50]], np.int32)
    found = (12, 2, 22, 14)  # 12.5 and 22.5 are rounded to even
    for box, hit in ((found, True), ((12, 2, 22, 19), True), ((12, 2, 22, 20), False), ((0, 0, 9, 9), False)):
        packed = box_hits(map_HW[None], (8, 8), np.array(geometry), size, [[box]])
        assert np.unpackbits(packed, axis=2, count=255)[0, 3].all() == hit


def test_maps_of_any_grid_are_resampled_and_batches_do_not_matter() -> None:
    rng, draw = np.random.default_rng(9), random.Random(9)
    map_Bhw = rng.random((30, 7, 7), np.float32)
    geometry_B4 = rng.uniform([0.5, 0.5, -9, -9], [3, 3, 9, 9], (30, 4))
    size_B2 = rng.integers(30, 400, (30, 2)).astype(np.int32)
    true = [[some_box(draw, *size) for _ in range(draw.randint(1, 4))] for size in size_B2.tolist()]
    together = box_hits(map_Bhw, (112, 112), geometry_B4, size_B2, true)
    alone = [
        box_hits(map_Bhw[i : i + 1], (112, 112), geometry_B4[i : i + 1], size_B2[i : i + 1], true[i : i + 1])[0]
        for i in range(30)
    ]
    np.testing.assert_array_equal(together, alone)
    assert together.any()
