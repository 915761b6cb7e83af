"""Read the header of a JPEG file, to tell plain files from those that only Pillow decodes as Saltern wants them."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2  # frames of Huffman codes
_FRAMES = frozenset((_BASELINE, _EXTENDED, _PROGRESSIVE))
_SOS, _APP1, _APP2, _APP14 = 0xDA, 0xE1, 0xE2, 0xEE
_KNOWN = _FRAMES | {0xC4, _SOS, 0xDB, 0xDD, 0xFE} | set(range(0xE0, 0xF0))  # DHT, DQT, DRI, COM, APP0..15
_EXIF, _ORIENTATION = b"Exif\0\0", 0x0112
_UNTURNED = ([3, 1, 0], [3, 1, 1])  # type, count and value of the orientation
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')  # as Pillow searches for it
_SAMPLINGS = (b"\x11", b"\x21", b"\x22")  # of the first component: 4:4:4, 4:2:2, 4:2:0


@dataclass(frozen=True, slots=True)
class Frame:
    """The frame of a plain JPEG file."""

    height: int  # pixels
    width: int
    simple: bool  # baseline with usual sampling, grey or YCbCr: every decoder shows the same


def plain_frame(data: bytes) -> Frame | None:
    """Return the frame of a plain JPEG file, else None.

    Plain: one frame of 8 bits, Huffman codes, grey or three components, upright by its metadata, and no more images in
    the same file. Only the header is read: the scans may be cut or damaged.
    """
    segments = list(_header(data))
    if not segments or segments[-1][0] != _SOS:
        return None
    frames = [segment for segment in segments if segment[0] in _FRAMES]
    metadata = [body for marker, body in segments if marker == _APP1]
    if (
        len(frames) != 1
        or any(marker not in _KNOWN for marker, _ in segments)
        or sum(body.startswith(_EXIF) for body in metadata) > 1  # Pillow joins them
        or not all(_upright(body) for body in metadata)
        or any(marker == _APP2 and body.startswith(b"MPF\0") for marker, body in segments)  # several images
    ):
        return None
    transforms = {body[11:12] for marker, body in segments if marker == _APP14 and body.startswith(b"Adobe")}
    return _frame(*frames[0], simple=transforms <= {b"\1"})


def _header(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and body of the segments up to the first scan, or up to what is not a whole segment."""
    start, end = 2, len(data)
    if data[:3] != b"\xff\xd8\xff":
        return
    while start + 4 <= end and data[start] == 0xFF:
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        if length < 2 or start + 2 + length > end:
            return
        yield marker, data[start + 4 : start + 2 + length]
        if marker == _SOS:
            return
        start += 2 + length


def _frame(marker: int, body: bytes, *, simple: bool) -> Frame | None:
    if len(body) < 6:
        return None
    bits, height, width, number = struct.unpack_from(">BHHB", body)
    if bits != 8 or not height or not width or number not in (1, 3) or len(body) != 6 + 3 * number:
        return None
    usual = body[7:8] in _SAMPLINGS and body[10::3] in (b"", b"\x11\x11") and body[6::3] in (b"\1\2\3", body[6:7])
    return Frame(height, width, simple and usual and marker == _BASELINE)


def _upright(body: bytes) -> bool:
    """Return whether metadata surely leaves the image as it is stored."""
    if not body.startswith(_EXIF):
        return all(value == b"1" for value in _XMP_ORIENTATION.findall(body))
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(body[6:10])
    if order is None:
        return False
    try:
        first = len(_EXIF) + struct.unpack_from(f"{order}L", body, 10)[0]
        (number,) = struct.unpack_from(f"{order}H", body, first)
        for entry in range(first + 2, first + 2 + 12 * number, 12):
            tag, *form = struct.unpack_from(f"{order}HHLH", body, entry)
            if tag == _ORIENTATION and form not in _UNTURNED:
                return False
    except struct.error:
        return False
    return True
