"""Boxes of the json member are read, made half-open, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import encoded
from making import write_tar
from PIL import Image

from saltern.pipeline.shards.annotations import MASK, read_annotation, read_mask
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.schemas.run import Shard


def annotated(content: Any) -> Sample:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Sample("k", 0, {"json": raw})


def test_inclusive_boxes_become_half_open() -> None:
    found = read_annotation(annotated({"boxes": [[3, 4, 3, 9], [0, 0, 63.0, 63]], "height": 64, "width": 64}))
    assert found is not None
    assert found.boxes == [(3, 4, 4, 10), (0, 0, 64, 64)]
    assert found.size == (64, 64)


@pytest.mark.parametrize("content", [{}, {"boxes": []}, {"boxes": None}, {"name": "cat"}])
def test_no_boxes(content: Any) -> None:
    assert read_annotation(annotated(content)) is None
    assert read_annotation(Sample("k", 0, {})) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        ([1], "not an object"),
        ({"boxes": "1 2 3 4"}, "not a list"),
        ({"boxes": [[1, 2, 3]]}, "is not a box"),
        ({"boxes": [[5, 2, 3, 4]]}, "is not a box"),
        ({"boxes": [[0.5, 2, 3, 4]]}, "whole pixels"),
        (b'{"boxes": [[0, 0, NaN, 4]]}', "is not a box"),
        (b'{"boxes": [[0, 0, Infinity, 4]]}', "is not a box"),
        ({"boxes": [["0", "0", "1", "1"]]}, "is not a box"),
        ({"boxes": [{"x": 1}]}, "is not a box"),
    ],
)
def test_boxes_that_cannot_be_read(content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_annotation(annotated(content))


@pytest.mark.parametrize(
    ("given", "number"), [({}, None), ({"distractors": 2}, 2), ({"distractors": []}, 0), ({"distractors": ["cat"]}, 1)]
)
def test_distractors_are_counted(given: dict[str, Any], number: int | None) -> None:
    found = read_annotation(annotated({"boxes": [[0, 0, 1, 1]], **given}))
    assert found is not None
    assert found.distractors == number


@pytest.mark.parametrize("value", ["cat", -1, 1.5, True, {}])
def test_other_distractors_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="distractors are neither"):
        read_annotation(annotated({"boxes": [[0, 0, 1, 1]], "distractors": value}))


def masked(pixels: Any, mode: str | None = None) -> Sample:
    image = Image.fromarray(np.array(pixels, np.uint8))
    return Sample("k", 0, {MASK: encoded(image.convert(mode) if mode else image, "PNG")})


def test_masks_have_foreground_and_ignored_pixels() -> None:
    mask_YX = read_mask(masked([[0, 1, 255], [128, 0, 128]]), 2, 3)
    assert mask_YX is not None
    assert mask_YX.dtype == np.uint8
    assert mask_YX.tolist() == [[0, 1, 1], [255, 0, 255]]
    black_white = read_mask(masked([[0, 255]], "1"), 1, 2)
    assert black_white is not None
    assert black_white.tolist() == [[0, 1]]
    assert read_mask(Sample("k", 0, {}), 2, 3) is None


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (masked([[0, 1]]), "has 1 x 2 pixels, the image 2 x 3"),
        (masked([[0, 1, 2], [0, 0, 0]]), "128 for ignored: \\[0, 1, 2\\]"),
        (masked([[[0, 1, 0]] * 3] * 2), "is not grey"),
        (Sample("k", 0, {MASK: b"no image"}), "cannot be decoded"),
    ],
)
def test_other_masks_are_refused_in_one_line(sample: Sample, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_mask(sample, 2, 3)
    assert MASK in str(caught.value)
    assert "\n" not in str(caught.value)


def test_masks_are_read_from_a_shard_if_they_are_wanted(tmp_path: Path) -> None:
    png = masked([[0, 1]]).members[MASK]
    write_tar(tmp_path / "a.tar", [("k", {"jpg": b"image", MASK: png}), ("l", {"jpg": b"image"})])
    shard = Shard("a", str(tmp_path / "a.tar"), (tmp_path / "a.tar").stat().st_size)
    first, second = read_samples(shard, more=frozenset({MASK}))
    assert read_mask(first, 1, 2) is not None
    assert read_mask(second, 1, 2) is None
    assert all(MASK not in sample.members for sample in read_samples(shard))
