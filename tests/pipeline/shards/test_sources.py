"""A local shard is read in pieces of any size, from any place, as the bytes that it has."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saltern.pipeline.shards.sources import LocalFile

DATA = os.urandom(200_001)


@contextmanager
def opened(path: Path, size: int = len(DATA), ahead: int = 2**16) -> Iterator[LocalFile]:
    path.write_bytes(DATA)
    with open(path, "rb", buffering=0) as file:
        yield LocalFile(file.fileno(), "a.tar", size, ahead)


@pytest.mark.parametrize("ahead", [512, 2**16])
def test_pieces_are_those_of_the_file(tmp_path: Path, ahead: int) -> None:
    draw = random.Random(0)
    with opened(tmp_path / "a.tar", ahead=ahead) as file:
        for _ in range(30):
            at = 0
            while at < len(DATA):
                size = draw.choice([0, 1, 512, draw.randint(1, 5000), draw.randint(1, 70_000), 2**14, 2**16])
                piece = file.read(size)
                assert piece == DATA[at : at + size]
                at += len(piece)
                if draw.random() < 0.2:  # back or forth
                    at = draw.randint(0, len(DATA))
                    file.seek(at)
            assert file.read(3) == b""
            file.seek(0)


def test_large_pieces_are_read_without_what_is_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header, an image of 100,000 bytes, a header: no byte of the image is read twice, and few bytes beyond."""
    calls, pread = [], os.pread

    def counted(descriptor: int, size: int, at: int) -> bytes:
        calls.append((size, at))
        return pread(descriptor, size, at)

    monkeypatch.setattr(os, "pread", counted)
    with opened(tmp_path / "a.tar") as file:
        for size in (512, 100_000, 512, 512):
            file.read(size)
    assert calls == [(2**16, 0), (100_000, 512), (2**12, 100_512)]


def test_reads_that_come_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: pread(descriptor, min(size, 999), at))
    with opened(tmp_path / "a.tar") as file:
        assert file.read(100_000) == DATA[:100_000]
        assert file.read(700) == DATA[100_000:100_700]


def test_a_file_that_ends_early_is_an_error_that_can_be_tried_again(tmp_path: Path) -> None:
    with opened(tmp_path / "a.tar", size=300_000) as file:
        assert file.read(200_000) == DATA[:200_000]
        with pytest.raises(ConnectionError, match=r"a.tar: the stream ended at byte 200001 of 300000"):
            file.read(512)
