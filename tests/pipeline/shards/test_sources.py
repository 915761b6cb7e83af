"""A shard is read in pieces of any size, as the bytes that it has, without a copy of those that are in memory."""

import gzip
import io
import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saltern.pipeline.shards.sources import LocalFile, Source, Window

DATA = random.Random(0).randbytes(200_001)


@contextmanager
def opened(path: Path, size: int = len(DATA), ahead: int = 2**16, *, seeks: bool = False) -> Iterator[Window]:
    path.write_bytes(DATA)
    with open(path, "rb", buffering=0) as file:
        local = LocalFile(file.fileno(), "a.tar", size)
        yield Window(local.readinto, ahead, local.seek if seeks else None)


def stream(ahead: int) -> Window:
    return Window(Source(io.BytesIO(DATA), "s3://b/a.tar", len(DATA)).readinto, ahead)


def check(window: Window, draw: random.Random) -> None:
    """Check pieces up to the end, with gaps between some of them."""
    at = 0
    while at < len(DATA):
        size = draw.choice([0, 1, 512, draw.randint(1, 5000), draw.randint(1, 70_000), 2**14, 2**16])
        assert window.take(at, size) == DATA[at : at + size]
        assert window.rest(at) == DATA[at : window.end]
        assert window.take(at, 2) == DATA[at : at + 2]
        at += draw.choice([0, size, size, size + draw.randint(0, 90_000)])
    assert window.take(at, 3) == b""


@pytest.mark.parametrize("ahead", [512, 2**16, 2**20])
@pytest.mark.parametrize("seeks", [True, False])
def test_pieces_are_those_of_the_file(tmp_path: Path, ahead: int, seeks: bool) -> None:
    for seed in range(30):
        with opened(tmp_path / "a.tar", ahead=ahead, seeks=seeks) as window:
            check(window, random.Random(seed))


@pytest.mark.parametrize("ahead", [512, 2**16])
def test_pieces_are_those_of_the_stream(ahead: int) -> None:
    for seed in range(30):
        check(stream(ahead), random.Random(seed))


def test_pieces_stay_as_they_are_while_the_window_moves(tmp_path: Path) -> None:
    with opened(tmp_path / "a.tar", ahead=5000) as window:
        pieces = [window.take(at, 700) for at in range(0, 199_000, 700)]
    assert b"".join(pieces) == DATA[: 700 * len(pieces)]


def test_a_seek_leaves_out_what_lies_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, preadv = [], os.preadv

    def counted(descriptor: int, buffers: list[memoryview], at: int) -> int:
        calls.append((len(buffers[0]), at))
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    with opened(tmp_path / "a.tar", ahead=512, seeks=True) as window:
        window.take(0, 512)
        window.take(100_352, 512)
    assert calls == [(512, 0), (512, 100_352)]


def test_reads_that_come_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:999]], at))
    with opened(tmp_path / "a.tar") as window:
        assert window.take(0, 100_000) == DATA[:100_000]
        assert window.take(100_000, 700) == DATA[100_000:100_700]


def test_a_file_that_ends_early_is_an_error_that_can_be_tried_again(tmp_path: Path) -> None:
    with opened(tmp_path / "a.tar", size=300_000) as window:
        assert window.take(0, 200_000) == DATA[:200_000]
        with pytest.raises(ConnectionError, match=r"a.tar: the stream ended at byte 200001 of 300000"):
            window.take(200_000, 512)


@pytest.mark.parametrize("cut", [100, 60_000, 150_000])
def test_what_precedes_the_damage_of_a_compressed_stream_is_read(cut: int) -> None:
    packed = gzip.compress(DATA)[:cut]
    intact = zlib.decompressobj(31).decompress(packed)
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as unpacked:
        window = Window(unpacked.readinto1, 2**20)
        sure = max(0, len(intact) - 2**16)  # zlib gives the last part only with what follows
        assert window.take(0, sure) == DATA[:sure]
        with pytest.raises(EOFError):
            window.take(sure, len(DATA))
