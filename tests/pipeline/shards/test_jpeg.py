"""Plain JPEG files, which torchcodec decodes, have Pillow's pixels; all other files, and damaged ones, are Pillow's."""

import io
import random
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from images import NOISE_HWC, encoded, with_exif
from mutate import Fuzz, mutate_bytes
from PIL import Image

from saltern.pipeline.shards.decode import DecodeError, decode
from saltern.pipeline.shards.decoder import CpuDecoder, decode_jpeg
from saltern.pipeline.shards.jpeg import plain_frame
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.config import Preprocess
from saltern.schemas.run import Shard
from saltern.schemas.saliency import DECODE_FAILED, OK, TOO_LARGE

PREPROCESS = Preprocess(64, 56)
CAT = Image.fromarray(skimage.data.chelsea()[:97, :131])
SOI = b"\xff\xd8"


class Plain:
    """torchcodec's function, which counts its images."""

    def __init__(self) -> None:
        self.decoded = 0
        found = decode_jpeg()
        assert found is not None
        self._decode = found

    def __call__(self, data: torch.Tensor, mode: str) -> torch.Tensor:
        pixels_CHW: torch.Tensor = self._decode(data, mode=mode)
        self.decoded += 1
        return pixels_CHW


def jpeg(image: Image.Image = CAT, **options: Any) -> bytes:
    return encoded(image, "JPEG", **options)


def with_segment(marker: int, body: bytes, data: bytes | None = None) -> bytes:
    data = jpeg() if data is None else data
    return SOI + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + data[2:]


def orientation(value: int, kind: int = 3, order: str = ">") -> bytes:
    head = b"MM\0*\0\0\0\x08" if order == ">" else b"II*\0\x08\0\0\0"
    return head + struct.pack(f"{order}HHHLHHL", 1, 0x0112, kind, 1, value, 0, 0)


def xmp(text: str) -> bytes:
    return with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text.encode())


def compare(data: bytes, decoder: CpuDecoder, preprocess: Preprocess = PREPROCESS) -> str:
    """Check a decoder against `decode`, and return the status."""
    batch = decoder([data])
    if batch.problems:
        status, reason = batch.problems[0]
        with pytest.raises(DecodeError) as error:
            decode(data, preprocess)
        assert (error.value.status, error.value.reason) == (status, reason)
        return status
    one = decode(data, preprocess)
    assert (batch.pixels_BHWC[0].numpy() == one.pixels_HWC).all()
    assert tuple(batch.size_B2[0]) == (one.image_height, one.image_width)
    assert tuple(batch.geometry_B4[0]) == one.geometry
    return OK


def plain_files() -> Iterator[tuple[str, bytes, bool]]:
    """Yield names, files and whether they are simple."""
    for sampling, progressive, restart in ((s, p, r) for s in (0, 1, 2) for p in (False, True) for r in (0, 3)):
        options = {"subsampling": sampling, "progressive": progressive, "restart_marker_blocks": restart}
        yield f"{options}", jpeg(**options), not progressive
    for sampling in (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440):
        made = cv2.imencode(".jpg", np.asarray(CAT), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1]
        yield f"{sampling:x}", made.tobytes(), False
    yield "rgb", jpeg(keep_rgb=True), False
    yield "grey", jpeg(CAT.convert("L")), True
    yield "grey, progressive", jpeg(CAT.convert("L"), progressive=True), False
    yield "optimised", jpeg(optimize=True, quality=30), True
    yield "noise", jpeg(Image.fromarray(NOISE_HWC), quality=100), True
    yield "a comment", jpeg(comment=b"\xff\xda" * 20), True
    yield "a colour profile", jpeg(icc_profile=b"profile" * 20_000), True
    yield "of no orientation", with_exif(orientation(0)), True
    yield "upright", with_exif(orientation(1)), True
    yield "upright, little endian", with_exif(orientation(1, order="<")), True
    yield "without orientation", jpeg(exif=Image.Exif()), True
    yield "upright by XMP", xmp('tiff:Orientation="1"'), True
    yield "XMP that Pillow does not read", xmp('exif:Orientation="6"'), True
    yield "bytes after the end", jpeg() + b"more", False
    for width, height in ((1, 1), (1, 900), (900, 1), (7, 5), (16, 17), (33, 8)):
        yield f"{width} x {height}", jpeg(CAT.resize((width, height))), True


def test_plain_files_have_the_pixels_of_pillow() -> None:
    plain = Plain()
    decoder = CpuDecoder(PREPROCESS, plain)
    for count, (name, data, simple) in enumerate(plain_files(), 1):
        image = Image.open(io.BytesIO(data))
        frame = plain_frame(data)
        assert frame is not None, name
        assert (frame.height, frame.width, frame.simple) == (image.height, image.width, simple), name
        assert compare(data, decoder) == OK, name
        assert plain.decoded == count, name


@pytest.mark.parametrize("change", [{"squash": True}, {"interpolation": "bicubic"}, {"resize": 300, "crop": 290}])
def test_every_way_of_resampling_is_that_of_pillow(change: dict[str, Any]) -> None:
    preprocess = Preprocess(**{"resize": 64, "crop": 56, **change})
    decoder = CpuDecoder(preprocess, decode_jpeg())
    for _, data, _ in plain_files():
        compare(data, decoder, preprocess)


def bomb(width: int, height: int) -> bytes:
    data = jpeg()
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (jpeg(CAT.convert("CMYK")), OK),
        *((with_exif(orientation(value)), OK) for value in (2, 3, 6, 8, 9)),
        (with_exif(orientation(6, order="<")), OK),
        (with_exif(orientation(1, kind=4)), OK),
        (with_exif(b"MM\0*\0\0\0\x08\xff\xff"), OK),
        (with_exif(b"what"), OK),
        (with_segment(0xE1, b"Exif\0\0", with_exif(orientation(1))), OK),
        (xmp('tiff:Orientation="6"'), OK),
        (xmp("<tiff:Orientation>6<"), OK),
        (encoded(CAT, "MPO", save_all=True, append_images=[CAT]), OK),
        (encoded(CAT, "PNG"), OK),
        (bomb(16_384, 16_384), TOO_LARGE),
        (bomb(0, 16), DECODE_FAILED),
        (with_segment(0xC0, b"\x08\0\x10\0\x10\1\1\x11\0"), DECODE_FAILED),  # two frames
        (jpeg().replace(b"\xff\xc0", b"\xff\xc9"), OK),  # arithmetic codes
        (b"", DECODE_FAILED),
        (SOI + b"\xff", DECODE_FAILED),
        (jpeg()[:30], DECODE_FAILED),
    ],
)
def test_other_files_are_left_to_pillow(data: bytes, status: str) -> None:
    plain = Plain()
    assert compare(data, CpuDecoder(PREPROCESS, plain)) == status
    assert plain.decoded == 0


def test_a_file_cut_anywhere_has_the_status_of_pillow() -> None:
    decoder = CpuDecoder(PREPROCESS, decode_jpeg())
    for data in (jpeg(CAT.resize((40, 30))), jpeg(CAT.resize((40, 30)), progressive=True)):
        found = Counter(compare(data[:end], decoder) for end in range(0, len(data), 7))
        assert found[DECODE_FAILED] > 20
        assert compare(data[:-1], decoder) == compare(data[:-2], decoder) == OK or found[OK] == 0


def mutated(sources: list[bytes], decoder: CpuDecoder, fuzz: Iterator[random.Random]) -> Counter[str]:
    return Counter(compare(mutate_bytes(rng.choice(sources), rng), decoder) for rng in fuzz)


@pytest.mark.slow
def test_damaged_files_have_the_pixels_and_statuses_of_pillow() -> None:
    plain, rng = Plain(), random.Random(0)
    sources = [data for _, data, _ in plain_files()]
    found = mutated(sources, CpuDecoder(PREPROCESS, plain), iter([rng] * 400))
    assert min(found[OK], found[DECODE_FAILED], plain.decoded) > 50


def test_many_damaged_files(fuzz: Fuzz) -> None:
    plain = Plain()
    sources = [data for _, data, _ in plain_files()]
    found = mutated(sources, CpuDecoder(PREPROCESS, plain), iter(fuzz))
    assert plain.decoded > found[OK] // 2 > 0


def test_photographs_have_the_pixels_of_pillow(shared_data: Path) -> None:
    plain, preprocess = Plain(), Preprocess()
    decoder, photographs = CpuDecoder(preprocess, plain), 0
    for path in sorted((shared_data / "imagenet-sample").glob("*.tar")):
        for sample in read_samples(Shard("s", str(path), path.stat().st_size)):
            assert sample.image is not None
            assert compare(sample.image, decoder, preprocess) == OK
            photographs += 1
    assert plain.decoded == photographs == 500


def test_an_error_of_memory_is_left_to_pillow() -> None:
    def scarce(data: torch.Tensor, mode: str) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    assert compare(jpeg(), CpuDecoder(PREPROCESS, scarce)) == OK


def test_without_torchcodec_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert decode_jpeg() is None
    assert CpuDecoder(PREPROCESS, decode_jpeg()).name == f"pillow {Image.__version__}"
    assert np.array_equal(CpuDecoder(PREPROCESS)([jpeg()]).pixels_BHWC[0], decode(jpeg(), PREPROCESS).pixels_HWC)
