"""Mutated tars and images: no crash, no hang, no sample lost in silence."""

import faulthandler
import gzip
import random
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from images import deep, encoded, square
from mutate import Fuzz, mutate_bytes
from PIL import ExifTags, Image
from tars import Members, shard_at, tar_bytes

from saltern.pipeline.shards.decode import DecodeError
from saltern.pipeline.shards.samples import list_keys, locate_images, read_samples
from saltern.schemas.errors import ShardError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import DECODE_FAILED, OK, TOO_LARGE

LIMIT_S, HANG_S = 20.0, 120.0  # of one round: CPU time that is a failure, and time that ends this process


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if a round takes long. A hang that holds the interpreter's lock ends the process with a traceback."""
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
    start = time.process_time()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.process_time() - start < LIMIT_S


def sources() -> list[tuple[str, bytes, int]]:
    """Return file names, tars and their numbers of samples."""
    short: Members = [(f"s{i}.{ext}", b"%d" % i * 300) for i in range(8) for ext in ("jpg", "cls", "json")]
    long: Members = [("folder/" * 20 + name, data) for name, data in short]
    mixed: Members = [(f"é{name}" if i % 2 else name, data) for i, (name, data) in enumerate(short)]
    tars = [
        (tar_bytes(members, format=format), len({name.partition(".")[0] for name, _ in members}))
        for members in (short, long, mixed)
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
    ]
    return [("x.tar", *tar) for tar in tars] + [("x.tar.gz", gzip.compress(tar), count) for tar, count in tars[:2]]


def mutate_tar(content: bytes, rng: random.Random) -> bytes:
    """Mutate anywhere, or within some blocks, whose checksums are then made right for the parsers behind them."""
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(changed) // 512) * 512
        block = bytearray(mutate_bytes(bytes(changed[start : start + 512]), rng)[:512].ljust(512, b"\0"))
        if rng.random() < 0.5:
            block[156] = rng.choice(b"0xgLKSX1257M\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        changed[start : start + 512] = block
    return bytes(changed)


def outcome(shard: Shard, read: object) -> list[str] | str:
    """Return the keys that a reader gives, or the error that it raises."""
    try:
        return [item if isinstance(item, str) else item.key for item in read(shard)]  # type: ignore[operator]
    except ShardError as error:
        # The position in a compressed stream depends on the pieces in which it is read.
        return re.sub(r"at byte \d+", "", str(error)) if shard.url.endswith("gz") else str(error)


def decoded(data: bytes) -> tuple[str, str]:
    """Return the status and the reason of an image's row. Any other exception fails the test."""
    try:
        assert square(data).pixels_HWC.shape == (56, 56, 3)
    except DecodeError as error:
        return error.status, error.reason
    return OK, ""


@pytest.mark.slow
def test_mutated_tars(fuzz: Fuzz, tmp_path: Path) -> None:
    originals, ends = sources(), Counter[str]()
    for rng in fuzz:
        name, content, count = rng.choice(originals)
        plain = rng.random() < 0.5  # such mutations break each checksum that covers them
        mutated = mutate_bytes(content, rng) if plain or name.endswith("gz") else mutate_tar(content, rng)
        with bounded():
            shard = shard_at(tmp_path / name, mutated)
            keys = outcome(shard, read_samples)
            assert outcome(shard, list_keys) == keys
            places = outcome(shard, locate_images) if name.endswith("tar") else keys
        if isinstance(keys, str):
            ends["refused"] += 1
            assert keys.startswith(shard.url)
            assert "\n" not in keys
            keys.encode()
            assert places == keys
        else:
            ends["read"] += 1
            "".join(keys).encode()
            assert set(places) <= set(keys)
            assert not plain or len(keys) >= count, "a sample is lost in silence"
    print(f"{fuzz.rounds} mutated tars: {dict(ends)}")


@pytest.mark.slow
def test_mutated_images(fuzz: Fuzz) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60))
    images = [
        *(encoded(image, format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF", "MPO")),
        *(encoded(image, format) for format in ("GIF", "BMP", "PPM")),
        *(encoded(deep(), format) for format in ("PNG", "TIFF")),
        encoded(image, "JPEG", progressive=True, comment=b"comment", icc_profile=b"profile" * 9),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.quantize(9), transparency=1),
        encoded(image, "WEBP", lossless=True, icc_profile=b"profile" * 9),
        *(encoded(image, "TIFF", compression=how) for how in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")),
    ]
    ends = Counter[str]()
    for rng in fuzz:
        data = mutate_bytes(rng.choice(images), rng)
        with bounded():
            status, reason = decoded(data)
        ends[status] += 1
        assert status in (OK, DECODE_FAILED, TOO_LARGE)
        assert bool(reason) == (status != OK)
        assert "\n" not in reason
        assert len(reason.encode()) < 500
    print(f"{fuzz.rounds} mutated images: {dict(ends)}")
