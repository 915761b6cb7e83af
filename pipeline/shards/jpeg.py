"""Read the header of a JPEG file, to tell plain files from those that only Pillow decodes as Saltern wants them."""

import re
import struct
from dataclasses import dataclass

from saltern.pipeline.shards.sources import Data

_BASELINE = 0xC0
_FRAMES = frozenset((_BASELINE, 0xC1, 0xC2))  # with Huffman codes: baseline, extended, progressive
_SOS, _APP1, _APP2, _APP14 = 0xDA, 0xE1, 0xE2, 0xEE
_DECIDING = _FRAMES | {_APP1, _APP2, _APP14}
_SKIPPED = {0xC4, 0xDB, 0xDD, 0xFE} | set(range(0xE0, 0xF0)) - _DECIDING  # DHT, DQT, DRI, COM, other APPs
_EXIF, _ORIENTATION = b"Exif\0\0", 0x0112
_UNTURNED = ([3, 1, 0], [3, 1, 1])  # type, count and value of the orientation
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')  # as Pillow searches for it
_SAMPLINGS = (b"\x11", b"\x21", b"\x22")  # of the first component: 4:4:4, 4:2:2, 4:2:0


@dataclass(frozen=True, slots=True)
class Frame:
    """The frame of a plain JPEG file."""

    height: int  # pixels
    width: int
    simple: bool  # baseline with usual sampling, grey or YCbCr, not cut: every decoder shows the same
    scan: int  # where the first scan begins, bytes


def plain_frame(data: Data) -> Frame | None:
    """Return the frame of a plain JPEG file, else None.

    Plain: one frame of 8 bits, Huffman codes, grey or three components, upright by its metadata, and no more images in
    the same file. Only the header is read: the scans may be cut or damaged.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    segments: list[tuple[int, bytes]] = []
    start, end = 2, len(data) - 4
    while start <= end and data[start] == 0xFF:
        marker, after = data[start + 1], start + 2 + (data[start + 2] << 8 | data[start + 3])
        if after < start + 4 or after > len(data):
            return None
        if marker in _DECIDING:
            segments.append((marker, bytes(data[start + 4 : after])))
        elif marker == _SOS:
            return _frame(segments, after, simple=data[-2:] == b"\xff\xd9")
        elif marker not in _SKIPPED:
            return None
        start = after
    return None


def _frame(segments: list[tuple[int, bytes]], scan: int, *, simple: bool) -> Frame | None:
    """Return the frame that the segments of a header define, if they make a plain file."""
    metadata, frames = 0, []
    for marker, body in segments:
        if marker in _FRAMES:
            frames.append((marker, body))
        elif marker == _APP1:
            metadata += body.startswith(_EXIF)
            if metadata > 1 or not _upright(body):  # Pillow joins several
                return None
        elif marker == _APP14:
            simple &= not body.startswith(b"Adobe") or body[11:12] == b"\1"  # YCbCr
        elif body.startswith(b"MPF\0"):  # several images
            return None
    if len(frames) != 1 or len(frames[0][1]) < 6:
        return None
    marker, body = frames[0]
    bits, height, width, number = struct.unpack_from(">BHHB", body)
    if bits != 8 or not height or not width or number not in (1, 3) or len(body) != 6 + 3 * number:
        return None
    usual = body[7:8] in _SAMPLINGS and body[10::3] in (b"", b"\x11\x11") and body[6::3] in (b"\1\2\3", body[6:7])
    return Frame(height, width, simple and usual and marker == _BASELINE, scan)


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
