"""A tar stream that proves itself whole while someone else reads it.

Python's tarfile, and webdataset on it, end silently at a damaged header, at a cut between two members, and before a
second archive in the same file: samples would be lost without a word.
"""

import gzip
import tarfile
import zlib
from typing import Any

BLOCK = 512  # bytes of a header, and what each member's data is padded to
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "pnm")
REPAIR = "copy the shard again, or repack its images with `saltern pack`"
_MAX_EXTENSION = 2**20  # bytes of a long name or a PAX header, which tarfile reads whole
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_DATALESS = (*_LINKS, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)


class TapeError(Exception):
    """The bytes are no whole tar. Its reason is no argument, as webdataset rewrites the arguments of exceptions."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class Source:
    """A stream of known length. One that simply ends before is a broken connection, to be tried again."""

    def __init__(self, stream: Any, url: str, size: int) -> None:
        self._stream, self._url, self._size = stream, url, size
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(None if size < 0 else size)
        self._at += len(data)
        if not data and size and self._at < self._size:
            raise ConnectionError(f"{self._url}: the stream ended at byte {self._at} of {self._size}")
        return data

    def seek(self, position: int) -> None:
        self._stream.seek(position)
        self._at = position


class Tape:
    """The file object given to webdataset: reads end at each member's border, so that nothing is read ahead.

    Args:
        url: for messages.
        source: the tar's bytes, decompressed.
        total: their number, None where it is not known.
        hollow: headers alone are read, by seeking; members come as zeros.

    `read` raises TapeError, with the place and the fix in words, where the tar is not whole.
    """

    def __init__(self, url: str, source: Any, total: int | None, *, hollow: bool = False) -> None:
        self._url, self._source, self._total, self._hollow = url, source, total, hollow
        self._at = 0  # bytes given out
        self._next = 0  # where the next header stands
        self._member = ""  # the name in the last header
        self._extension = False  # the last header's data belong to the next header: a long name
        self.size = 0  # bytes of the member whose header was read last
        self.ended = False  # the end-of-archive blocks were seen, and nothing after them

    def __str__(self) -> str:
        return self._url

    def error(self, what: str) -> TapeError:
        """`what` is wrong, with the place on the tape and the fix."""
        after = f", after member {self._member!r}" if self._member else ""
        return TapeError(f"{what} at byte {self._at}{after}; {REPAIR}")

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; b"" after the end."""
        if self._at == self._next:
            return b"" if self.ended else self._header()
        wanted = min(size, self._next - self._at)
        data = bytes(wanted) if self._hollow and not self._extension else self._fetch(wanted)
        self._at += len(data)
        if len(data) < wanted:
            raise TapeError(f"the tar is cut at byte {self._at}, inside member {self._member!r}; {REPAIR}")
        return data

    def _fetch(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer at the end alone."""
        try:
            data: bytes = self._source.read(size)
            while len(data) < size and (more := self._source.read(size - len(data))):
                data += more
        except EOFError as error:
            raise self.error("the gzip stream is cut; its tar ends") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise self.error(f"the gzip stream is damaged ({error})") from error
        return data

    def _header(self) -> bytes:
        if self._hollow:
            self._source.seek(self._at)
        block = self._fetch(BLOCK)
        if len(block) < BLOCK:
            raise self._cut(block)
        if block.count(0) == BLOCK:
            self._finish()
            return block
        try:
            name, kind, size = _parse(block)
        except (tarfile.HeaderError, ValueError) as error:
            raise self._no_header(block) from error
        self._check(name, kind, size)
        self._at += BLOCK
        self._next = self._at + (0 if kind in _DATALESS else -(-size // BLOCK) * BLOCK)
        self.size = size
        self._extension = kind in _EXTENSIONS
        if not self._extension:
            self._member = name
        if self._total is not None and self._next > self._total:
            raise TapeError(f"the tar is cut at byte {self._total}, inside member {name!r}; {REPAIR}")
        return block

    def _check(self, name: str, kind: bytes, size: int) -> None:
        if size < 0 or (kind in _EXTENSIONS and size > _MAX_EXTENSION):
            raise self.error(f"tar header with a size of {size} bytes")
        if kind == tarfile.GNUTYPE_SPARSE:
            raise self.error(f"sparse member {name!r}, which holds no plain bytes,")
        if kind in _LINKS and name.lower().endswith(IMAGES):
            raise self.error(f"{name!r} is a link and holds no bytes (tar needs -h)")

    def _cut(self, block: bytes) -> TapeError:
        if not self._at and not block:
            return TapeError("the file is empty, not even an empty tar; copy the shard again")
        if not self._at:
            return self._no_header(block)
        return self.error("the tar is cut: it ends without end-of-archive blocks")

    def _no_header(self, block: bytes) -> TapeError:
        if self._at:
            return self.error("damaged tar header")
        if block.startswith(b"\x1f\x8b"):
            return TapeError("compressed by gzip; let its name end in .tar.gz, or decompress it")
        return TapeError(f"no tar: it begins with {block[:8].hex(' ')}; pack images with `saltern pack`")

    def _finish(self) -> None:
        """Reads to the very end: nothing but zeros may follow."""
        while rest := self._fetch(2**20):
            if rest.count(0) != len(rest):
                raise self.error(
                    "data after the end of the archive (tars that were concatenated? "
                    "unpack them with `tar --ignore-zeros -xf`)"
                )
        self.ended = True


def _parse(block: bytes) -> tuple[str, bytes, int]:
    """Name, type and size in a header, of a plain file at a third of the cost. Raises HeaderError or ValueError."""
    try:
        plain = int(block[148:154], 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
        size = int(block[124:136].rstrip(b"\0"), 8)
    except ValueError:
        plain = False
    kind = block[156:157]
    if plain and kind == tarfile.REGTYPE:
        return block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), kind, size
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return info.name, info.type, info.size
