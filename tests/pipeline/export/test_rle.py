"""Run-length encodings against their own readers: pycocotools, and rle-pack's decoder written out bit by bit."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from saltern.pipeline.export.rle import brush_rle, coco_rle

# pycocotools 2.0.11 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def masks() -> list[NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    drawn = [rng.random((int(rng.integers(1, 60)), int(rng.integers(1, 60)))) < rng.random() for _ in range(60)]
    blob = np.zeros((300, 500), bool)
    blob[40:290, 33:480] = True
    edges = [np.zeros((1, 1), bool), np.ones((1, 1), bool), np.zeros((7, 9), bool), np.ones((7, 9), bool)]
    return [*drawn, *edges, blob, ~blob, np.ones((700, 900), bool)]


@pytest.mark.parametrize("mask_YX", masks(), ids=lambda mask: f"{mask.shape}-{mask.sum()}")
def test_cocos_counts_are_those_of_pycocotools(mask_YX: NDArray[np.bool_]) -> None:
    counts = coco_rle(mask_YX)
    assert counts == coco.encode(np.asfortranarray(mask_YX, np.uint8))["counts"].decode()
    assert np.array_equal(coco.decode({"size": list(mask_YX.shape), "counts": counts}), mask_YX)


def unpack(packed: list[int]) -> NDArray[np.uint8]:
    """Return the values that rle-pack's `decode` reads, bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in packed)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    values, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out: list[int] = []
    while len(out) < values:
        repeated = read(1)
        count = read(sizes[read(2)]) + 1
        out += [read(word)] * count if repeated else [read(word) for _ in range(count)]
    assert len(bits) - at < 8
    return np.array(out, np.uint8)


@pytest.mark.parametrize("mask_YX", masks()[::3] + masks()[-7:], ids=lambda mask: f"{mask.shape}-{mask.sum()}")
def test_label_studio_reads_the_mask_in_all_four_channels(mask_YX: NDArray[np.bool_]) -> None:
    packed = brush_rle(mask_YX)
    assert all(0 <= byte < 256 for byte in packed)
    image_YX4 = unpack(packed).reshape(*mask_YX.shape, 4)
    assert np.array_equal(image_YX4, np.repeat(mask_YX[..., None], 4, 2) * np.uint8(255))
