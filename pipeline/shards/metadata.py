"""Remove metadata from image files, as damage to it must not cost the pixels."""

import struct
import zlib
from collections.abc import Iterator

_SMALL = 2**16  # bytes of a chunk of metadata that may stay
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_JPEG_COLOURS = (0xE0, 0xEE)  # JFIF and Adobe, which say what the channels are
_EXIF = 0xE1
_WEBP_METADATA = 0x2C  # flags of a colour profile, EXIF and XMP


def without_metadata(data: bytes) -> Iterator[bytes]:
    """Yield the image file with only its small and undamaged metadata, then with none. Other formats yield nothing.

    The first keeps the orientation, if the damage is elsewhere.
    """
    if data.startswith(_PNG):
        chunks = list(_png_chunks(data))
        yield _PNG + b"".join(chunk for chunk, critical, sound in chunks if critical or sound)
        yield _PNG + b"".join(chunk for chunk, critical, _ in chunks if critical)
    elif data.startswith(_JPEG):
        yield _JPEG + b"".join(_jpeg_segments(data, (*_JPEG_COLOURS, _EXIF)))
        yield _JPEG + b"".join(_jpeg_segments(data, _JPEG_COLOURS))
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        body = b"".join(_webp_chunks(data))
        yield b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bool, bool]]:
    """Yield each chunk, whether the pixels need it, and whether it is small and undamaged."""
    start = len(_PNG)
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        kind, end = data[start + 4 : start + 8], start + 12 + length
        chunk = data[start:end]
        sound = length < _SMALL and chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        yield chunk, not kind[0] & 0x20, sound
        start = end
    yield data[start:], True, True


def _jpeg_segments(data: bytes, kept: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the segments before the scan, without comments and application data of other kinds, then the rest."""
    start = len(_JPEG)
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
        marker, end = data[start + 1], start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == 0xFF:  # padding
            start += 1
            continue
        if marker in kept or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield data[start:end]
        start = end
    yield data[start:]


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks that pixels need, with the header's flags of metadata cleared."""
    start = 12
    while start + 8 <= len(data):
        kind, (length,) = data[start : start + 4], struct.unpack_from("<I", data, start + 4)
        end = start + 8 + length + length % 2
        if kind == b"VP8X":
            flags = bytes(flag & ~_WEBP_METADATA for flag in data[start + 8 : start + 9])
            yield data[start : start + 8] + flags + data[start + 9 : end]
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            yield data[start:end]
        start = end
