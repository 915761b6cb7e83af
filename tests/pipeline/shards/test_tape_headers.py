"""Extension headers are bounded and followed strictly; links, sparse members and odd types are errors with a fix."""

import io
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from reading import BLOCK, fails, read
from tars import samples, shard_at, tar_bytes

IMAGE = b"\xff\xd8 image"


def pax(body: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return an extension header with this body."""
    info = tarfile.TarInfo("PaxHeaders/x")
    info.size, info.type = len(body), kind
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)


def behind(headers: bytes, count: int) -> bytes:
    """Return a tar of samples that begins with these headers."""
    content = headers + tar_bytes(samples(count)).rstrip(b"\0")
    return content + bytes(-len(content) % BLOCK + 2 * BLOCK)


def record(keyword: bytes, value: bytes) -> bytes:
    tail = b" %s=%s\n" % (keyword, value)
    length = len(tail) + 1
    while len(b"%d" % length) + len(tail) != length:
        length += 1
    return b"%d%s" % (length, tail)


def folder_of_links(tmp_path: Path, name: str, *, hard: bool) -> Path:
    """Return a folder with one image and five links to it whose paths are long."""
    deep = tmp_path.joinpath("in", *["folder" * 8] * 3)
    deep.mkdir(parents=True)
    (deep / f"0{name}").write_bytes(IMAGE)
    for number in range(1, 6):
        link = deep / f"{number}{name}"
        link.hardlink_to(deep / f"0{name}") if hard else link.symlink_to(f"0{name}")
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("hard", "format"), [(False, "gnu"), (False, "posix"), (False, "ustar"), (True, "gnu"), (True, "posix")]
)
def test_links_with_long_names_are_refused_and_the_advice_works(tmp_path: Path, hard: bool, format: str) -> None:
    folder = folder_of_links(tmp_path, ".jpg", hard=hard)
    tar = ["tar", f"--format={format}", "-C", str(folder), "-cf", str(tmp_path / "x.tar")]
    subprocess.run([*tar, "."], check=True)
    fails(shard_at(tmp_path / "x.tar"), "is a link without data", "`tar -h --hard-dereference`")
    subprocess.run([*tar, "-h", "--hard-dereference", "."], check=True)
    assert [sample.image for sample in read(shard_at(tmp_path / "x.tar"))] == [IMAGE] * 6


@pytest.mark.parametrize("name", ["a.cls", "a.json", "d/a.JPG"])
def test_a_link_in_place_of_a_member_that_is_read(tmp_path: Path, name: str) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, "b"
        tar.addfile(info)
    fails(shard_at(tmp_path / "x.tar", made.getvalue()), f"{name!r} is a link")


def test_a_link_that_is_not_read_is_a_member(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in ("a.txt", "README", "._b.jpg"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "b"
            tar.addfile(info)
    (sample,) = read(shard_at(tmp_path / "x.tar", made.getvalue()))
    assert sample.key == "a"
    assert sample.problem


@pytest.mark.parametrize(
    "body",
    [
        b"1" * 250_000,
        b"9" * 4000 + b" path=x\n",
        b"11 path=a.jpg\n",
        b"14 path=a.jpg",
        b"-14 path=a.jpg\n",
        b"+4 path=a.jpg\n",
        b"0 path=a.jpg\n",
        b"1_4 path=a.jpg\n",
        b"9999 path=a.jpg\n",
        b" path=a.jpg\n",
    ],
)
def test_damaged_records_end_at_once(tmp_path: Path, body: bytes) -> None:
    start = time.process_time()
    fails(shard_at(tmp_path / "x.tar", pax(body) + tar_bytes(samples(1))), "damaged PAX header")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_extension_headers_are_bounded(tmp_path: Path, kind: bytes) -> None:
    fails(shard_at(tmp_path / "x.tar", pax(b"1" * 2**20, kind) + tar_bytes(samples(1))), "a size of 1048576 bytes")


def test_a_large_attribute_of_a_file_is_passed_over(tmp_path: Path) -> None:
    body = record(b"SCHILY.xattr.user.note", b"\n=" * 32_000) + record(b"path", b"long/" * 40 + b"a.jpg") + bytes(99)
    (sample, *others) = read(shard_at(tmp_path / "x.tar", behind(pax(body), 2)))
    assert (sample.key, sample.image) == ("long/" * 40 + "a", b"image")
    assert [other.key for other in others] == ["s0", "s1"]


def test_many_extension_headers_take_no_memory_and_no_time(tmp_path: Path) -> None:
    start = time.process_time()
    headers = pax(record(b"comment", b"x" * 200)) * 4_000
    found = read(shard_at(tmp_path / "x.tar", behind(headers, 2)))
    assert [sample.key for sample in found] == ["s0", "s1"]
    assert time.process_time() - start < 5


@pytest.mark.parametrize("keyword", [b"path", b"size"])
def test_a_global_header_that_names_members(tmp_path: Path, keyword: bytes) -> None:
    global_header = pax(record(keyword, b"5"), tarfile.XGLTYPE)
    fails(shard_at(tmp_path / "x.tar", global_header + tar_bytes(samples(1))), "all members")


def test_a_global_comment_as_git_archive_writes_it(tmp_path: Path) -> None:
    global_header = pax(record(b"comment", b"0123abc"), tarfile.XGLTYPE)
    assert len(read(shard_at(tmp_path / "x.tar", behind(global_header, 2)))) == 2


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=posix"], ["--format=posix", "--sparse-version=0.0"]])
def test_a_sparse_tar_is_refused_and_the_advice_works(tmp_path: Path, options: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "a.jpg", "wb") as file:
        file.truncate(2**24)
        file.seek(2**23)
        file.write(b"x")
    tar = ["tar", "-C", str(folder), "-cf", str(tmp_path / "x.tar")]
    subprocess.run([*tar, *options, "--sparse", "a.jpg"], check=True)
    assert (tmp_path / "x.tar").stat().st_size < 2**16
    fails(shard_at(tmp_path / "x.tar"), "sparse member", "without `tar --sparse`")
    subprocess.run([*tar, "a.jpg"], check=True)
    assert [len(sample.image or b"") for sample in read(shard_at(tmp_path / "x.tar"))] == [2**24]


@pytest.mark.parametrize("kind", [b"M", b"Z", b"A"])
def test_members_of_other_types_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = kind
    fails(shard_at(tmp_path / "x.tar", info.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * BLOCK)), "'a.jpg' of a type")


@pytest.mark.slow
def test_many_members_of_one_key(tmp_path: Path) -> None:
    start = time.process_time()
    members = [(f"a.m{number}", b"x") for number in range(20_000)]
    (sample,) = read(shard_at(tmp_path / "x.tar", tar_bytes(members, format=tarfile.USTAR_FORMAT)))
    assert time.process_time() - start < 10
    assert sample.problem
    assert "and 19992 more" in sample.problem[1]
    assert len(sample.problem[1]) < 200
