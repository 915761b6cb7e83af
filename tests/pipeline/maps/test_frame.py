"""Boxes of the network's input in the original image."""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from naive_rows import original_box

from saltern.pipeline.maps.frame import to_original


def placed(box: Sequence[int], geometry: Sequence[float], height: int, width: int) -> list[int]:
    """Return one box in the original."""
    size_12 = np.array([[height, width]], np.int32)
    (found,) = to_original(np.array([box]), np.array([geometry]), size_12).tolist()
    return [int(edge) for edge in found]


def test_boxes_of_a_batch_are_placed_as_each_alone() -> None:
    generator = np.random.default_rng(0)
    begin_R2, side_R2 = generator.integers(0, 200, (500, 2)), generator.integers(1, 25, (500, 2))
    box_R4, size_R2 = np.concatenate([begin_R2, begin_R2 + side_R2], 1), generator.integers(1, 900, (500, 2))
    geometry_R4 = generator.uniform([0.1, 0.1, -50, -50], [5, 5, 300, 300], (500, 4))
    geometry_R4[::5] = geometry_R4[::5].round(0) + 0.5  # edges halfway between two pixels
    expected = [
        original_box(box, geometry, *size)
        for box, geometry, size in zip(box_R4.tolist(), geometry_R4.tolist(), size_R2.tolist(), strict=True)
    ]
    assert to_original(box_R4, geometry_R4, size_R2.astype(np.int32)).tolist() == expected


def test_to_original_of_an_untouched_image_is_the_box() -> None:
    for box in itertools.product(range(4), range(4), range(4, 8), range(4, 8)):
        assert placed(box, (1.0, 1.0, 0.0, 0.0), 8, 8) == list(box)


def test_to_original_follows_a_resize_and_crop() -> None:
    # 640 x 480, shorter side to 256, centre crop 224: one input pixel is 1.875 original ones.
    geometry = (1.875, 1.875, 110.0, 30.0)
    assert placed((0, 0, 224, 224), geometry, 480, 640) == [110, 30, 530, 450]
    assert placed((100, 50, 101, 52), geometry, 480, 640) == [298, 124, 299, 128]


def test_to_original_stays_inside_and_never_empties() -> None:
    source = random.Random(0)
    for _ in range(3000):
        height, width, side = source.randint(1, 900), source.randint(1, 900), source.choice([1, 7, 224])
        scale = min(height, width) / source.randint(side, 2 * side)
        geometry = (scale, scale, (width - scale * side) / 2, (height - scale * side) / 2)
        x0, y0 = source.randrange(side), source.randrange(side)
        box = (x0, y0, source.randint(x0 + 1, side), source.randint(y0 + 1, side))
        left, top, right, bottom = placed(box, geometry, height, width)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        exact = [geometry[2 + i % 2] + scale * box[i] for i in range(4)]
        # Within half a pixel, except for smaller boxes, of which one pixel is kept.
        slack = 0.5 if min(exact[2] - exact[0], exact[3] - exact[1]) >= 1 else 1.5
        assert all(abs(a - b) <= slack + 1e-6 for a, b in zip((left, top, right, bottom), exact, strict=True))


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (6, 6, 7, 7), (0, 0, 7, 7)])
def test_to_original_on_an_image_of_one_pixel(box: tuple[int, int, int, int]) -> None:
    assert placed(box, (1 / 7, 1 / 7, 0.0, 0.0), 1, 1) == [0, 0, 1, 1]
