"""Each defect of a tar is an error that names the place and the fix."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import pytest
from reading import BLOCK, fails, header_at, read
from tars import samples, shard_at, tar_bytes

from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.errors import ShardError


@pytest.mark.parametrize("at", [1, 100, BLOCK, 700, BLOCK + 5000])
def test_cut_inside_a_member(tmp_path: Path, at: int) -> None:
    content = tar_bytes(samples(3, bytes(10_000)))
    cut = content[: header_at(content, "s1.jpg") + at]
    words = ("after member 's0.cls'",) if at < BLOCK else ("inside member 's1.jpg'", f"byte {len(cut)}")
    fails(shard_at(tmp_path / "x.tar", cut), "cut", "copy the shard again", *words)


@pytest.mark.parametrize("member", ["s0.cls", "s1.jpg", "s2.cls"])
def test_cut_between_two_members(tmp_path: Path, member: str) -> None:
    content = tar_bytes(samples(3))
    at = header_at(content, member)
    with tarfile.open(fileobj=io.BytesIO(content[:at])) as tar:
        assert len(tar.getmembers()) == {"s0.cls": 1, "s1.jpg": 2, "s2.cls": 5}[member]  # tarfile reports no error
    fails(shard_at(tmp_path / "x.tar", content[:at]), "without end-of-archive blocks", f"byte {at}", "copy")


def test_cut_before_the_end_blocks(tmp_path: Path) -> None:
    content = tar_bytes(samples(3))
    at = header_at(content, "s2.cls") + 2 * BLOCK
    fails(shard_at(tmp_path / "x.tar", content[:at]), "without end-of-archive blocks", "after member 's2.cls'")


def test_cut_in_a_long_name(tmp_path: Path) -> None:
    content = tar_bytes([("a.jpg", b"I"), ("d/" * 100 + "b.jpg", b"I")], format=tarfile.GNU_FORMAT)
    fails(shard_at(tmp_path / "x.tar", content[: 3 * BLOCK]), "cut")
    fails(shard_at(tmp_path / "y.tar", content[: 4 * BLOCK]), "cut")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_end_after_a_long_name(tmp_path: Path, format: int) -> None:
    content = tar_bytes([("a.jpg", b"I"), ("d/" * 100 + "b.jpg", b"I")], format=format)
    fails(shard_at(tmp_path / "x.tar", content[: 4 * BLOCK] + bytes(2 * BLOCK)), "before the member of a long name")


def test_two_tars_in_one_file(tmp_path: Path) -> None:
    one, two = tar_bytes(samples(2)), tar_bytes(samples(4))
    fails(shard_at(tmp_path / "x.tar", one + two), "data after the end of the archive", "--ignore-zeros", "'s1.cls'")


def test_garbage_after_the_end(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar", tar_bytes(samples(2)) + bytes(3_000_000) + b"x"), "data after the end")


@pytest.mark.parametrize("offset", [0, 124, 148, 156, 300])
def test_a_damaged_header_in_the_middle(tmp_path: Path, offset: int) -> None:
    content = bytearray(tar_bytes(samples(3)))
    at = header_at(bytes(content), "s1.jpg")
    content[at + offset] ^= 0x55
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert len(tar.getmembers()) == 2  # tarfile reports no error
    fails(shard_at(tmp_path / "x.tar", bytes(content)), f"damaged tar header at byte {at}", "after member 's0.cls'")


def test_no_flipped_header_byte_loses_a_sample(tmp_path: Path) -> None:
    content = tar_bytes(samples(3))
    at = header_at(content, "s1.jpg")
    whole = [sample.key for sample in read(shard_at(tmp_path / "x.tar", content))]
    failed = 0
    for offset in range(BLOCK):
        flipped = bytearray(content)
        flipped[at + offset] ^= 0x11
        try:
            assert list_keys(shard_at(tmp_path / "x.tar", bytes(flipped))) == whole
        except ShardError:
            failed += 1
    assert failed >= BLOCK - 2  # only the checksum's padding may change


def test_data_overwritten_by_zeros_in_the_middle(tmp_path: Path) -> None:
    content = bytearray(tar_bytes(samples(5)))
    at = header_at(bytes(content), "s1.jpg")
    content[at : at + 2 * BLOCK] = bytes(2 * BLOCK)
    fails(shard_at(tmp_path / "x.tar", bytes(content)), "data after the end of the archive")


def header(size: bytes, kind: bytes) -> bytes:
    """Return a header with a correct checksum and any size field and type."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("size", "kind", "word"),
    [
        (b"\xff" * 12, tarfile.REGTYPE, "a size of -1 bytes"),
        (b"\x80" + struct.pack(">3xq", 2**62), tarfile.REGTYPE, "cut"),
        (b"77777777777\0", tarfile.XHDTYPE, "a size of 8589934591 bytes"),
        (b"77777777777\0", tarfile.GNUTYPE_LONGNAME, "a size of 8589934591 bytes"),
        (b"00000000000\0", tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"zzzzzzzzzzz\0", tarfile.REGTYPE, "damaged tar header at byte 0; copy the shard again"),
    ],
)
def test_hostile_headers(tmp_path: Path, size: bytes, kind: bytes, word: str) -> None:
    fails(shard_at(tmp_path / "x.tar", header(size, kind) + bytes(9 * BLOCK)), word)


def test_a_header_that_gives_two_sizes(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 1, {"size": "1024"}
        tar.addfile(info, io.BytesIO(b"I"))
        info = tarfile.TarInfo("b.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"I"))
    fails(shard_at(tmp_path / "x.tar", made.getvalue()), "cannot be followed")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_place_of_an_image(tmp_path: Path, kind: bytes) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        tar.addfile(info)
    fails(shard_at(tmp_path / "x.tar", made.getvalue()), "'a.jpg' is a link", "-h")


def test_an_empty_file(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar", b""), "empty", "copy the shard again")


def test_one_flipped_bit_in_the_first_name_is_damage(tmp_path: Path) -> None:
    content = bytearray(tar_bytes([("a.jpg", b"I")]))
    content[0] ^= 1
    fails(shard_at(tmp_path / "x.tar", bytes(content)), "damaged tar header at byte 0; copy the shard again")


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a jpeg" * 100, b"x", b"<html>404</html>" * 99])
def test_a_file_that_is_no_tar(tmp_path: Path, content: bytes) -> None:
    fails(shard_at(tmp_path / "x.tar", content), "not a tar", content[:1].hex(), "saltern pack")


def test_gzip_under_the_name_of_a_tar(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar", gzip.compress(tar_bytes(samples(1)))), "gzip", ".tar.gz")


def test_a_gzip_name_without_gzip(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar.gz", tar_bytes(samples(1))), "gzip stream is damaged")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_gzip_cut(tmp_path: Path, share: float) -> None:
    import random

    content = gzip.compress(tar_bytes(samples(5, random.Random(0).randbytes(5000))))
    fails(shard_at(tmp_path / "x.tar.gz", content[: int(share * len(content))]), "gzip stream is cut")


def test_gzip_damaged(tmp_path: Path) -> None:
    import random

    content = bytearray(gzip.compress(tar_bytes(samples(5, random.Random(0).randbytes(5000)))))
    content[len(content) // 2] ^= 0xFF
    fails(shard_at(tmp_path / "x.tar.gz", bytes(content)), "gzip stream is damaged")


def test_gzip_of_an_empty_stream(tmp_path: Path) -> None:
    fails(shard_at(tmp_path / "x.tar.gz", gzip.compress(b"")), "empty")
