"""A tar that changes between its listing and its last byte is an error of the environment, never other samples."""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from s3server import S3, used_server
from tars import samples, shard_at, tar_bytes

from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys, locate_images, read_samples
from saltern.schemas.run import Shard, same_time

OLD = tar_bytes(samples(30, b"old" * 40_000))
NEW = tar_bytes(samples(30, b"new" * 40_000))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with used_server(monkeypatch) as server:
        yield server


def listed(path: Path, content: bytes = OLD) -> Shard:
    path.write_bytes(content)
    ((shard,), _) = expand([str(path)])
    return shard


def refused(shard: Shard, *, as_listed: bool = True) -> str:
    with pytest.raises(OSError, match="changed since it was listed") as error:
        list(read_samples(shard, as_listed=as_listed))
    return str(error.value)


@pytest.mark.parametrize("content", [NEW, OLD[:-10_240], OLD + bytes(10_240), tar_bytes([]), b""])
def test_a_file_that_changes_after_the_listing(tmp_path: Path, content: bytes) -> None:
    shard = listed(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(content)
    os.utime(shard.url, ns=(0, shard.mtime_ns + 10**9) if shard.mtime_ns else None)
    assert shard.url in refused(shard)


def test_a_file_that_was_only_touched_is_read_if_nobody_asks_for_the_listed_one(tmp_path: Path) -> None:
    shard = listed(tmp_path / "x.tar")
    os.utime(shard.url, ns=(0, 10**18))
    assert len(list(read_samples(shard))) == len(list_keys(shard)) == 30
    assert "written again" in refused(shard)


@pytest.mark.parametrize("how", ["in place", "renamed", "shorter", "damaged"])
def test_a_file_that_is_written_while_it_is_read(tmp_path: Path, how: str) -> None:
    shard = listed(tmp_path / "x.tar")
    reader = read_samples(shard)
    assert next(reader).key == "s0"
    if how == "renamed":
        (tmp_path / "y.tar").write_bytes(NEW)
        os.replace(tmp_path / "y.tar", shard.url)
    else:
        content = {"in place": NEW, "shorter": NEW[:1_000_000], "damaged": b"\x55" * len(OLD)}[how]
        with open(shard.url, "r+b") as file:
            file.write(content)
            file.truncate(len(content))
    with pytest.raises(OSError, match=r"changed since it was listed|the stream ended at byte"):
        list(reader)


def test_keys_and_places_are_checked_too(tmp_path: Path) -> None:
    shard = listed(tmp_path / "x.tar")
    places = locate_images(shard)
    next(places)
    with open(shard.url, "r+b") as file:
        file.write(NEW)
    with pytest.raises(OSError, match="changed since it was listed"):
        list(places)
    (tmp_path / "x.tar").write_bytes(OLD[:-10_240])
    with pytest.raises(OSError, match="changed since it was listed"):
        list_keys(shard)


def test_a_limited_shard_is_checked_as_well(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "x.tar", OLD, take=2)
    reader = read_samples(shard)
    next(reader)
    with open(shard.url, "r+b") as file:
        file.write(NEW)
    next(reader)
    with pytest.raises(OSError, match="changed since it was listed"):
        next(reader)


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    shard = listed(tmp_path / "x.tar")
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        list(read_samples(shard))


@pytest.mark.parametrize("content", [NEW, OLD[:-10_240], tar_bytes([]), b""])
def test_an_object_that_changes_after_the_listing(store: S3, content: bytes) -> None:
    store.objects["x.tar"] = OLD
    ((shard,), _) = expand(["s3://bucket/x.tar"])
    assert len(list(read_samples(shard, as_listed=True))) == 30
    store.objects["x.tar"] = content
    store.written["x.tar"] = datetime(2020, 1, 1, tzinfo=UTC)
    assert "s3://bucket/x.tar" in refused(shard)


@pytest.mark.parametrize("content", [NEW, OLD[:-10_240], tar_bytes([])])
@pytest.mark.parametrize("request_number", [1, 2, 3])
def test_an_object_that_changes_between_two_requests(store: S3, content: bytes, request_number: int) -> None:
    store.objects["x.tar"] = OLD
    ((shard,), _) = expand(["s3://bucket/x.tar"])
    asked = []

    def change(request: str) -> None:
        asked.append(request)
        if len(asked) == request_number:
            store.objects["x.tar"] = content
            store.written["x.tar"] = datetime(2020, 1, 1, tzinfo=UTC)

    store.before = change
    with pytest.raises(OSError, match=r"changed since it was listed|the stream ended at byte|416|Range"):
        list(read_samples(shard, as_listed=True))


def test_times_of_two_listings() -> None:
    second = 10**9
    assert same_time(None, 5)
    assert same_time(7 * second, 7 * second + 123_456_789)  # one of them has whole seconds
    assert same_time(7 * second + 123_456_700, 7 * second + 123_456_789)  # one has no nanoseconds
    assert not same_time(7 * second, 8 * second)
    assert not same_time(7 * second + 123_456_789, 7 * second + 123_999_789)


def test_a_copy_of_the_tars_keeps_the_run(tmp_path: Path) -> None:
    shard = listed(tmp_path / "x.tar")
    shutil.copy2(shard.url, tmp_path / "y.tar")
    shutil.move(tmp_path / "y.tar", shard.url)
    assert len(list(read_samples(shard, as_listed=True))) == 30
