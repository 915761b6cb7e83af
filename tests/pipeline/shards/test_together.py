"""Files that are read together, a window of the tar at a time, are those that tarfile finds."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from tars import shard_at, tar_bytes

from saltern.pipeline.shards import samples as module
from saltern.pipeline.shards.samples import content_of, read_samples
from saltern.schemas.run import Shard

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
Files = list[tuple[str, bytes]]


def made(draw: random.Random, form: int) -> bytes:
    """Return a tar of plain files and of others: long and foreign names, links, folders, fractions of seconds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number in range(40):
            folder = draw.choice(["", "", "", "d/", "d.x/", "long/" * 25, "\xfc/"])
            for ext, size in (("jpg", draw.choice([0, 511, 512, 513, 5_000, 20_000, 70_000])), ("txt", 9), ("cls", 1)):
                info = tarfile.TarInfo(f"{folder}{number}.{ext}")
                info.size, info.mtime = size, draw.choice([0, 0, 1.5])
                if ext == "txt" and draw.random() < 0.2:
                    info.type, info.linkname, info.size = draw.choice([tarfile.SYMTYPE, tarfile.DIRTYPE]), "x", 0
                tar.addfile(info, io.BytesIO(draw.randbytes(size) if ext == "jpg" else b"7" * size))
    return out.getvalue()


def expected(content: bytes) -> Files:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = [(info.name, tar.extractfile(info)) for info in tar if info.name.endswith((".jpg", ".cls"))]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(name, tar.extractfile(name).read()) for name, _ in files]  # type: ignore[union-attr]


def found(shard: Shard, *, shared: bool) -> Files:
    samples = list(read_samples(shard, shared=shared))
    return [(f"{sample.key}.{ext}", bytes(data)) for sample in samples for ext, data in sample.members.items()]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("ahead", [512, 2**12, 2**16, 2**22])
def test_files_are_those_of_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, ahead: int) -> None:
    monkeypatch.setattr(module, "_AHEAD", ahead)
    content = made(random.Random(ahead), FORMATS[form])
    right = expected(content)
    shards = [shard_at(tmp_path / "x.tar", content), shard_at(tmp_path / "x.tar.gz", gzip.compress(content))]
    for shard in shards:
        assert found(shard, shared=True) == found(shard, shared=False) == right
    assert content_of(shards[0]) == content_of(shards[1])


def test_only_large_members_are_parts_of_larger_memory(tmp_path: Path) -> None:
    content = made(random.Random(0), tarfile.GNU_FORMAT)
    for sample in read_samples(shard_at(tmp_path / "x.tar", content), shared=True):
        for data in sample.members.values():
            assert isinstance(data, memoryview) == (len(data) >= 2**14)
        assert isinstance(sample.image, bytes)
        assert sample.image == sample.shared_image


def test_members_do_not_keep_the_memory_of_those_that_are_not_read(tmp_path: Path) -> None:
    draw = random.Random(0)
    members = [
        (f"{n}.{ext}", draw.randbytes(size)) for n in range(8) for ext, size in (("npy", 70_000), ("jpg", 30_000))
    ]
    samples = list(read_samples(shard_at(tmp_path / "x.tar", tar_bytes(members)), shared=True))
    assert [sample.members["jpg"] for sample in samples] == [data for name, data in members if name.endswith("jpg")]
    assert all(isinstance(sample.members["jpg"], bytes) for sample in samples)


def test_an_unusual_header_among_plain_ones_is_read(tmp_path: Path) -> None:
    """A checksum with spaces, as old tars have it, is none of a plain header."""
    content = bytearray(made(random.Random(1), tarfile.USTAR_FORMAT))
    right = expected(bytes(content))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        offsets = [info.offset for info in tar if info.isreg()]
    for offset in offsets[3::4]:
        stated = int(content[offset + 148 : offset + 154], 8)
        content[offset + 148 : offset + 156] = b"%6o\0 " % stated
    assert expected(bytes(content)) == right
    assert found(shard_at(tmp_path / "x.tar", bytes(content)), shared=True) == right
