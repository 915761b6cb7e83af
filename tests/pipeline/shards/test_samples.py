"""Samples are grouped as webdataset does; repeated keys and large members are problems of their samples."""

import gzip
import io
import itertools
import tarfile
from pathlib import Path

import pytest
from reading import BLOCK, fails, header_at, read
from tars import Members, samples, shard_at, tar_bytes
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from saltern.pipeline.shards import members as module
from saltern.pipeline.shards.members import split_name
from saltern.pipeline.shards.samples import list_keys, read_samples
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import DUPLICATE_KEY, MISSING_IMAGE, TOO_LARGE


def test_samples_are_those_of_webdataset(shared_data: Path) -> None:
    path = shared_data / "tiny-imagenet" / "val-000000.tar"
    found = read(shard_at(path))
    with open(path, "rb") as stream:
        theirs = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    assert len(found) == len(theirs) == 500
    for ours, other in zip(found, theirs, strict=True):
        assert ours.key == other["__key__"]
        assert ours.members == {ext: other[ext] for ext in ("jpg", "cls", "json")}
        assert (ours.image, ours.label, ours.problem) == (other["jpg"], int(other["cls"]), None)


def test_only_wanted_members_are_kept(tmp_path: Path) -> None:
    members = [("a/b.JPG", b"I"), ("a/b.cls", b" 7\n"), ("a/b.json", b"{}"), ("a/b.txt", b"x"), ("a/b.seg.png", b"y")]
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes(members)))
    assert (sample.key, sample.image, sample.label, sample.problem) == ("a/b", b"I", 7, None)
    assert sorted(sample.members) == ["cls", "jpg", "json"]


@pytest.mark.parametrize("ext", ["jpg", "jpeg", "jpe", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "PGM", "Pnm"])
def test_image_extensions(tmp_path: Path, ext: str) -> None:
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes([(f"a.{ext}", b"I")])))
    assert sample.image == b"I"


@pytest.mark.parametrize(
    "cls", [b"", b"cat", b"1.5", b"\xff", b"99999999999", b"9" * 5000, b"3_14", b"3 14", b"--3", b"-7"]
)
def test_a_label_that_is_no_number(tmp_path: Path, cls: bytes) -> None:
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes([("a.jpg", b"I"), ("a.cls", cls)])))
    assert sample.label is None
    assert sample.problem is None


@pytest.mark.parametrize(
    ("cls", "label"), [(b" +7\n", 7), (b"\xef\xbb\xbf7", 7), (b"0" * 20 + b"7", 7), (b"2147483647", 2**31 - 1)]
)
def test_a_label_that_is_a_number(tmp_path: Path, cls: bytes, label: int) -> None:
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes([("a.jpg", b"I"), ("a.cls", cls)])))
    assert sample.label == label


def test_no_label(tmp_path: Path) -> None:
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes([("a.jpg", b"I")])))
    assert sample.label is None


def test_a_sample_without_an_image_is_a_sample(tmp_path: Path) -> None:
    members = [("a.txt", b"t"), ("b.cls", b"1"), ("c.jpg", b"I"), ("d.v2.jpg", b"I"), ("e.npy", b"n")]
    found = read(shard_at(tmp_path / "x.tar", tar_bytes(members)))
    assert [sample.key for sample in found] == ["a", "b", "c", "d", "e"]
    assert [sample.problem is None for sample in found] == [False, False, True, False, False]
    for sample, has in zip(found, (".txt", ".cls", "", ".v2.jpg", ".npy"), strict=True):
        if sample.problem:
            status, reason = sample.problem
            assert status == MISSING_IMAGE
            assert has in reason


def test_what_is_no_member_of_a_sample_is_passed_over(tmp_path: Path) -> None:
    members = [
        ("__meta__", b"{}"),
        ("README", b"r"),
        ("._a.jpg", b"mac"),
        ("d/._a.jpg", b"mac"),
        ("__MACOSX/._a.jpg", b"mac"),
        ("d/.DS_Store", b"mac"),
        ("a.jpg", b"I"),
    ]
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes(members)))
    assert (sample.key, sample.image) == ("a", b"I")


def test_files_that_webdataset_filters_are_samples(tmp_path: Path) -> None:
    names = ["__meta__/b.jpg", "__MACOSX/a.jpg", "__x__/__y__/c.jpg", ".hidden/d.jpg", "__e__.jpg"]
    found = read(shard_at(tmp_path / "x.tar", tar_bytes([(name, b"I") for name in names])))
    assert [f"{sample.key}.jpg" for sample in found] == names


def test_a_tar_whose_files_are_no_samples_is_refused(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar", tar_bytes([("a", b"I"), ("b", b"I")])), "2 files", "'a'", "a.jpg")


def test_folders_are_no_members(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        folder = tarfile.TarInfo("d.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("d.jpg/a.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"I"))
    (sample,) = read(shard_at(tmp_path / "x.tar", made.getvalue()))
    assert sample.key == "d.jpg/a"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_each_format(tmp_path: Path, format: int) -> None:
    key = "/".join(["folder" * 8] * 3) + "/" + "n" * 90
    members = [(f"{key}{i}.{ext}", b"I%d" % i) for i in range(3) for ext in ("cls", "jpg")]
    found = read(shard_at(tmp_path / "x.tar", tar_bytes(members, format=format)))
    assert [(sample.key, sample.image) for sample in found] == [(f"{key}{i}", b"I%d" % i) for i in range(3)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_beyond_ascii(tmp_path: Path, format: int) -> None:
    members = [("è/日本.jpg", b"I"), (b"\xe9t\xe9.jpg".decode("utf-8", "surrogateescape"), b"J")]
    found = read(shard_at(tmp_path / "x.tar", tar_bytes(members, format=format)))
    # The second name is Latin-1. Its key is unique and can be stored.
    assert [sample.key for sample in found] == ["è/日本", r"\xe9t\xe9"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_byte_of_a_name_reaches_a_row_that_cannot_be_stored(tmp_path: Path, format: int) -> None:
    raw = [
        b"\xff.\x1b[2J\nx",
        b"\xe9/\xff.\xe9",
        b"a.\xed\xa0\x80.x",
        b"\xf0\x28\x8c\xbc.txt",
        b"x\x80." + b"\x80y" * 60,
    ]
    members = [(name.decode("utf-8", "surrogateescape"), b"I") for name in raw]
    for sample in read(shard_at(tmp_path / "x.tar", tar_bytes(members, format=format))):
        assert sample.problem
        assert "\\x" in f"{sample.key} {sample.problem[1]}".encode().decode()
        assert sample.problem[1].isprintable()


def test_two_keys_that_are_equal_when_stored_are_a_repeat(tmp_path: Path) -> None:
    raw = b"\xe9".decode("utf-8", "surrogateescape")
    members = [(r"\xe9.jpg", b"I"), (f"{raw}.cls", b"1"), (f"{raw}.jpg", b"J")]
    first, second = read(shard_at(tmp_path / "x.tar", tar_bytes(members)))
    assert (first.key, second.key) == (r"\xe9", r"\xe9")
    assert (first.label, first.problem) == (None, None)
    assert second.problem is not None
    assert second.problem[0] == DUPLICATE_KEY


@pytest.mark.parametrize("ending", ["tar.gz", "tgz"])
def test_gzip(tmp_path: Path, ending: str) -> None:
    found = read(shard_at(tmp_path / f"x.{ending}", gzip.compress(tar_bytes(samples(3)))))
    assert [sample.label for sample in found] == [0, 1, 2]


def test_take_ends_early_and_does_not_look_at_what_follows(tmp_path: Path) -> None:
    content = tar_bytes(samples(5))
    shard = shard_at(tmp_path / "x.tar", content[: header_at(content, "s4.jpg")], take=3)
    assert [sample.key for sample in read(shard)] == ["s0", "s1", "s2"]


def test_an_empty_tar_holds_no_samples(tmp_path: Path) -> None:
    assert read(shard_at(tmp_path / "x.tar", tar_bytes([]))) == []


def test_one_end_block_is_enough(tmp_path: Path) -> None:
    content = tar_bytes(samples(2)).rstrip(b"\0")
    content += bytes(-len(content) % BLOCK + BLOCK)
    assert len(read(shard_at(tmp_path / "x.tar", content))) == 2


# Repeated keys

REPEATS: list[tuple[str, Members, list[str], dict[int, int]]] = [
    ("side by side", [("a.cls", b"0"), ("a.jpg", b"I"), ("a.cls", b"1"), ("a.jpg", b"J")], ["a", "a"], {1: 0}),
    ("apart", [("a.jpg", b"I"), ("b.jpg", b"I"), ("a.jpg", b"J"), ("a.cls", b"0")], ["a", "b", "a"], {2: 0}),
    ("not contiguous", [("a.jpg", b"I"), ("b.jpg", b"I"), ("a.cls", b"0")], ["a", "b", "a"], {2: 0}),
    ("twice one name", [("z.jpg", b"I"), ("a.jpg", b"I"), ("a.jpg", b"J")], ["z", "a", "a"], {2: 1}),
    ("case of the ending", [("a.jpg", b"I"), ("a.JPG", b"J")], ["a", "a"], {1: 0}),
    ("unwanted member twice", [("a.txt", b"1"), ("a.jpg", b"I"), ("a.txt", b"2")], ["a", "a"], {1: 0}),
    ("three times", [("a.jpg", b"I")] * 3, ["a", "a", "a"], {1: 0, 2: 0}),
]


@pytest.mark.parametrize(("members", "keys", "repeats"), [case[1:] for case in REPEATS], ids=[c[0] for c in REPEATS])
def test_repeated_keys_are_samples_with_a_problem(
    tmp_path: Path, members: Members, keys: list[str], repeats: dict[int, int]
) -> None:
    found = read(shard_at(tmp_path / "x.tar", tar_bytes(members)))
    assert [sample.key for sample in found] == keys
    for sample in found:
        if sample.index not in repeats:
            assert sample.problem is None
            continue
        assert sample.problem is not None
        assert sample.problem[0] == DUPLICATE_KEY
        assert f"sample {repeats[sample.index]} " in sample.problem[1]
        assert "saltern pack" in sample.problem[1]


# Members too large to read


def test_a_member_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBER", 1000)
    members = [("a.jpg", bytes(1000)), ("b.jpg", bytes(1001)), ("b.cls", b"1"), ("c.txt", bytes(5000)), ("c.jpg", b"I")]
    found = read(shard_at(tmp_path / "x.tar", tar_bytes(members)))
    assert [sample.problem and sample.problem[0] for sample in found] == [None, TOO_LARGE, None]
    assert found[1].members == {"cls": b"1"}
    assert found[1].problem is not None
    assert "1001 bytes" in found[1].problem[1]


def test_a_real_member_too_large_takes_no_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = module.MAX_MEMBER + 1
    with open(path, "wb") as file:  # a sparse file
        file.write(info.tobuf())
        file.truncate(BLOCK + info.size + -info.size % BLOCK)
        file.seek(0, 2)
        file.write(tar_bytes(samples(1))[: 6 * BLOCK])
    tracemalloc.start()
    try:
        first, second = read_samples(shard_at(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.problem is not None
    assert first.problem[0] == TOO_LARGE
    assert second.problem is None
    assert peak < 2**24


# The environment


def test_a_deleted_shard(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "x.tar", tar_bytes(samples(2)))
    (tmp_path / "x.tar").unlink()
    for read_it in (lambda: list(read_samples(shard)), lambda: list_keys(shard)):
        with pytest.raises(FileNotFoundError):
            read_it()


def test_a_stream_that_simply_ends_is_a_broken_connection(tmp_path: Path) -> None:
    from saltern.pipeline.shards.sources import Source

    source = Source(io.BytesIO(b"x" * 700), "s3://b/x.tar", 1000)
    assert source.read(700)
    with pytest.raises(ConnectionError, match=r"s3://b/x.tar: the stream ended at byte 700 of 1000"):
        source.read(10)


def test_a_closed_reader_leaves_no_open_file(tmp_path: Path) -> None:
    import os

    shard = shard_at(tmp_path / "x.tar", tar_bytes(samples(50, bytes(9999))))
    before = len(os.listdir("/proc/self/fd"))
    reader = read_samples(shard)
    next(reader)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("url", ["http://host/x.tar", "pipe:cat x.tar", "hdfs://a/b", "file:///x.tar", "ftp://a/b"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="s3:// or a gs:// URL"):
        filesystem(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///x.tar", "s3://key:secret@bucket/x.tar"])
def test_urls_that_name_no_bucket_or_carry_secrets(url: str) -> None:
    with pytest.raises(UserError, match="BUCKET/PATH") as error:
        filesystem(url)
    assert "secret" not in str(error.value)


def test_local_paths() -> None:
    store, path = filesystem("/a/b c:d.tar")
    assert (store.type_name, path) == ("local", "/a/b c:d.tar")


def test_names_are_split_as_webdataset_does() -> None:
    names = ("".join(letters) for length in range(7) for letters in itertools.product("a./\n", repeat=length))
    for name in names:
        key, ext = base_plus_ext(name)
        hidden = key is None or name.rpartition("/")[2].startswith(".")
        assert split_name(name) == (None if hidden else (key, ext)), name
