"""Damaged or oversized metadata never costs the pixels, and a damaged image is said to be damaged."""

import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from images import NOISE_HWC, deep, encoded, fails, square
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from saltern.pipeline.shards import decode as module
from saltern.pipeline.shards.decode import MAX_PIXELS
from saltern.schemas.saliency import OUT_OF_MEMORY


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def with_chunk(png: bytes, added: bytes, *, at_end: bool = False) -> bytes:
    """Return the PNG with a chunk after its header, or before its end."""
    at = len(png) - 12 if at_end else 33
    return png[:at] + added + png[at:]


def rotated(format: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Software] = "camera" * 30
    return encoded(NOISE_HWC, format, exif=exif, icc_profile=b"profile" * 40, **options)


TEXT = b"Comment\0" + bytes(range(32, 127)) * 50_000
BOMB = b"Comment\0\0" + zlib.compress(bytes(2**26))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "added",
    [
        chunk(b"tEXt", TEXT),
        chunk(b"zTXt", BOMB),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**26))),
        chunk(b"iCCP", BOMB),
        chunk(b"zTXt", BOMB) * 40,
        chunk(b"tEXt", b"Comment\0damaged", crc=1),
        chunk(b"pHYs", b"short"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"x", crc=5),
        chunk(b"sRGB", b""),
        chunk(b"tIME", b"", crc=5),
        chunk(b"acTL", b"x"),
        chunk(b"fcTL", bytes(26)) * 2,
        chunk(b"iCCP", b"no end of the name"),
        chunk(b"iTXt", b"broken"),
        chunk(b"eXIf", b"II*\0" + b"\xff" * 40),
        chunk(b"vpAg", b"private", crc=7),
    ],
    ids=lambda added: f"{added[4:8].decode()}-{len(added)}",
)
def test_metadata_chunks_of_a_png(added: bytes, at_end: bool) -> None:
    png = encoded(NOISE_HWC)
    np.testing.assert_array_equal(square(with_chunk(png, added, at_end=at_end)).pixels_HWC, square(png).pixels_HWC)


def test_the_orientation_stays_if_another_chunk_is_damaged() -> None:
    png = rotated("PNG")
    found = square(with_chunk(png, chunk(b"tEXt", b"Comment\0damaged", crc=1)))
    assert (found.image_height, found.image_width) == (80, 60)
    np.testing.assert_array_equal(found.pixels_HWC, square(png).pixels_HWC)


def test_transparency_and_deep_greys_stay() -> None:
    for image in (encoded(deep()), encoded(Image.fromarray(NOISE_HWC).quantize(9), transparency=1)):
        broken = with_chunk(image, chunk(b"tEXt", b"Comment\0damaged", crc=1))
        np.testing.assert_array_equal(square(broken).pixels_HWC, square(image).pixels_HWC)


@pytest.mark.slow
def test_much_sound_text_is_no_damage() -> None:
    info = PngInfo()
    for number in range(300):
        info.add_text(f"k{number}", "x" * 300_000, zip=True)
    png = encoded(NOISE_HWC, pnginfo=info)
    np.testing.assert_array_equal(square(png).pixels_HWC, square(encoded(NOISE_HWC)).pixels_HWC)


def metadata_of(format: str, data: bytes) -> Iterator[range]:
    """Yield the bodies of the file's metadata."""
    if format == "JPEG":
        start = 2
        while data[start + 1] != 0xDA:
            length = struct.unpack_from(">H", data, start + 2)[0]
            if 0xE1 <= data[start + 1] <= 0xED or data[start + 1] == 0xFE:
                yield range(start + 4, start + 2 + length)
            start += 2 + length
    elif format == "PNG":
        start = 8
        while start < len(data):
            length = struct.unpack_from(">I", data, start)[0]
            if data[start + 4] & 0x20:
                yield range(start + 8, start + 12 + length)
            start += 12 + length
    else:
        start = 12
        while start < len(data):
            length = struct.unpack_from("<I", data, start + 4)[0]
            if data[start : start + 4] in (b"EXIF", b"ICCP", b"XMP "):
                yield range(start + 8, start + 8 + length)
            start += 8 + length + length % 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_no_damage_inside_metadata_costs_the_pixels(format: str) -> None:
    draw = random.Random(format)
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "camera" * 30
    more = {"comment": b"a comment"} if format == "JPEG" else {}
    data = encoded(NOISE_HWC, format, exif=exif, icc_profile=b"profile" * 40, **more)
    places = [place for body in metadata_of(format, data) for place in body]
    assert len(places) > 200
    for _ in range(150):
        broken = bytearray(data)
        for place in draw.sample(places, draw.choice([1, 3, 100])):
            broken[place] = draw.randrange(256)
        found = square(bytes(broken))
        assert sorted((found.image_height, found.image_width)) == [60, 80]  # it may have become an orientation


@pytest.mark.parametrize(("format", "at"), [("PNG", 20), ("PNG", 60), ("TIFF", 4), ("WEBP", 20), ("JPEG", 4)])
def test_the_reason_names_damage_and_not_the_format(format: str, at: int) -> None:
    data = encoded(NOISE_HWC, format)
    reason = fails(data[:at] + b"\xa5" * 40 + data[at + 40 :])
    assert "damaged image" in reason
    assert "known format" not in reason


def test_a_png_whose_header_chunk_is_damaged_says_which() -> None:
    png = encoded(NOISE_HWC)
    assert "IHDR" in fails(png[:20] + b"\x01" + png[21:])


def test_memory_that_runs_out_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    png, upright, left = encoded(NOISE_HWC), module._upright, [1]

    def scarce(data: bytes) -> Image.Image:
        if left and left.pop():
            raise MemoryError
        return upright(data)

    monkeypatch.setattr(module, "_upright", scarce)
    assert square(png).image_width == 80
    left[:] = [1, 1]
    assert "memory" in fails(png, OUT_OF_MEMORY)


def test_deep_greys_are_converted_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = square(encoded(deep())).pixels_HWC
    float_tiff = encoded(deep().astype(np.float32), "TIFF")
    whole_float = square(float_tiff).pixels_HWC
    monkeypatch.setattr(module, "_STRIP", 700)  # pixels
    np.testing.assert_array_equal(square(encoded(deep())).pixels_HWC, whole)
    np.testing.assert_array_equal(square(float_tiff).pixels_HWC, whole_float)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_deep_grey_at_the_limit_takes_at_most_two_copies(tmp_path, dtype: type) -> None:  # type: ignore[no-untyped-def]
    """Pillow's memory is seen only from outside, as the peak of a process."""
    import subprocess
    import sys

    grey_HW = np.zeros((2**12, 2**13), dtype)
    grey_HW[::7] = 40_000
    Image.fromarray(grey_HW).save(tmp_path / "x.tif", compression="tiff_lzw")
    code = (
        "import resource, sys; from saltern.pipeline.shards.decode import decode_image\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "data = open(sys.argv[1], 'rb').read(); before = peak(); decode_image(data); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x.tif"], capture_output=True, check=True)
    assert int(run.stdout) < 10 * grey_HW.size  # bytes; RGB takes 4 a pixel
    assert 10 * MAX_PIXELS < 1.4 * 2**30
