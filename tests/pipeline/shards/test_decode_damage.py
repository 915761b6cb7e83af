"""Decoding damaged or oversized bytes gives a DecodeError and no other exception."""

import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import skimage.data
from images import NOISE_HWC, deep, encoded, fails, square, with_exif
from PIL import ExifTags, Image

from saltern.pipeline.shards import decode as module
from saltern.pipeline.shards.decode import MAX_PIXELS, DecodeError
from saltern.schemas.saliency import TOO_LARGE

# Not images, or too large


@pytest.mark.parametrize(
    "data", [b"", b"x", b"not an image" * 50, b"%PDF-1.4\n" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9]
)
def test_no_image(data: bytes) -> None:
    assert "not an image of a known format" in fails(data)


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "JPEG2000"])
def test_formats_off_the_list_are_refused(format: str) -> None:
    assert "not an image of a known format" in fails(encoded(Image.new("RGB", (32, 32)), format))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated(format: str, share: float) -> None:
    data = encoded(NOISE_HWC, format)
    assert str(int(share * len(data))) in fails(data[: int(share * len(data))]) or share < 0.1


def test_a_truncated_jpeg_says_so() -> None:
    data = encoded(NOISE_HWC, "JPEG")
    assert "truncated" in fails(data[: len(data) // 2])


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size that its data does not have."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(2**14, 2**13 + 1), (20_000, 9_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_too_large(size: tuple[int, int]) -> None:
    # Between Pillow's two limits, and beyond both.
    said = fails(png_header(*size), TOO_LARGE)
    assert said.endswith(f" pixels; at most {MAX_PIXELS} are decoded")
    assert "bomb" not in said


def test_the_limit_itself_is_tried() -> None:
    assert "damaged image" in fails(png_header(2**13, 2**10))
    assert MAX_PIXELS >= 2**13 * 2**10


def test_large_and_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 60 * 80)
    assert square(encoded(NOISE_HWC)).image_width == 80
    monkeypatch.setattr(module, "MAX_PIXELS", 60 * 80 - 1)
    assert "80 x 60 pixels" in fails(encoded(NOISE_HWC), TOO_LARGE)


def test_no_size() -> None:
    fails(png_header(0, 5))


# Random damage


def mutations(data: bytes, draw: random.Random, count: int) -> list[bytes]:
    made = [data[: draw.randrange(len(data))] for _ in range(count)]
    for _ in range(count):
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 1, 3, 20])):
            # Half of the changes are in the header, which the parsers read.
            flipped[draw.randrange(len(data) if draw.random() < 0.5 else min(len(data), 200))] = draw.randrange(256)
        made.append(bytes(flipped))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "MPO"])
def test_hostile_bytes_give_decoded_or_decode_error(format: str) -> None:
    draw = random.Random(format)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.fromarray(skimage.data.chelsea()[:90, :120])
    sources = [encoded(image, format, **({} if format in ("GIF", "BMP", "PPM") else {"exif": exif}))]
    if format == "JPEG":
        sources.append(encoded(image, format, progressive=True, quality=50))
    if format == "PNG":
        sources += [encoded(image.quantize(9), transparency=1), encoded(deep()), encoded(image.convert("LA"))]
    if format == "TIFF":
        sources += [encoded(image, format, compression=how) for how in ("tiff_lzw", "jpeg", "tiff_deflate")]
    failed = 0
    for source in sources:
        assert square(source).pixels_HWC.shape == (56, 56, 3)
        for data in mutations(source, draw, 300 // len(sources)):
            try:
                found = square(data)
            except DecodeError:  # any other exception fails the test
                failed += 1
            else:
                assert found.pixels_HWC.shape == (56, 56, 3)
    assert failed > 100


def test_threads_decode_the_same_and_leave_warnings_as_they_were() -> None:
    warns = with_exif(b"II*\0\x08\0\0\0\xff\xff")
    sources = [encoded(NOISE_HWC), encoded(NOISE_HWC, "JPEG")[:-200], warns, encoded(deep())]

    def work(index: int) -> bytes:
        try:
            return square(sources[index % 4]).pixels_HWC.tobytes()
        except DecodeError as error:
            return error.reason.encode()

    expected = [work(index) for index in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a filter that precedes the one set by decoding
        work(0)
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, range(400))) == expected * 100
    with pytest.warns(UserWarning, match="mine"):  # other warnings are still seen
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_decoding_sets_its_filter_once(recwarn: pytest.WarningsRecorder) -> None:
    square(encoded(NOISE_HWC))
    before = list(warnings.filters)
    square(encoded(NOISE_HWC))
    assert warnings.filters == before
    assert sum(filter == module._QUIET for filter in before) == 1
