"""Boxes of the json member are read, made half-open, or refused."""

import json
from typing import Any

import pytest

from saltern.pipeline.shards.annotations import read_annotation
from saltern.pipeline.shards.samples import Sample


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
