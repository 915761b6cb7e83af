"""The CRC-32 of a shard's samples tells whether a tar of the same size holds other data."""

import os
from pathlib import Path

import pytest
from making import write_tar

from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import content_of

SAMPLES = [("a", {"jpg": b"one", "cls": "1"}), ("b", {"jpg": b"two", "cls": "2"})]


def content(path: Path, samples: list[tuple[str, dict[str, bytes | str]]]) -> str:
    ((shard,), _) = expand([str(write_tar(path, samples))])
    return content_of(shard)


@pytest.mark.parametrize(
    "changed",
    [
        [("a", {"jpg": b"onf", "cls": "1"}), SAMPLES[1]],
        [("a", {"jpg": b"one", "cls": "3"}), SAMPLES[1]],
        [("c", {"jpg": b"one", "cls": "1"}), SAMPLES[1]],
        [SAMPLES[1], SAMPLES[0]],
        [("a", {"jpg": b"onet", "cls": "1"}), ("b", {"jpg": b"wo", "cls": "2"})],
        [("a", {"png": b"one", "cls": "1"}), SAMPLES[1]],
    ],
)
def test_other_data_has_another_content(tmp_path: Path, changed: list[tuple[str, dict[str, bytes | str]]]) -> None:
    assert content(tmp_path / "a.tar", changed) != content(tmp_path / "a.tar", SAMPLES)  # type: ignore[arg-type]


def test_equal_data_has_equal_content_and_the_listing_knows_the_mtime(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    os.utime(path, ns=(5, 7))
    ((shard,), _) = expand([str(path)])
    assert shard.mtime_ns == 7
    before = content_of(shard)
    assert len(before) == 8
    int(before, 16)
    assert content(tmp_path / "b.tar", SAMPLES) == before  # type: ignore[arg-type]
