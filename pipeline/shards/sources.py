"""The bytes of shards: streams, and files of this machine, that tell an early end from the end.

An early end is a broken connection, which can be tried again.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Data = bytes | memoryview  # of a file; a memoryview shares the memory that they were read into


class Source(io.RawIOBase):
    """A stream of known length. An early end is a broken connection, which can be tried again."""

    def __init__(self, stream: Any, url: str, size: int) -> None:
        super().__init__()
        self._stream, self._url, self._size = stream, url, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._at += count
        if not count and len(buffer) and self._at < self._size:
            raise _ended_early(self._url, self._at, self._size)
        return count


class LocalFile:
    """A local file of known length.

    Args:
        descriptor: of the open file.
        url: for messages.
        size: bytes of the file.
    """

    def __init__(self, descriptor: int, url: str, size: int) -> None:
        self._descriptor, self._url, self._size = descriptor, url, size
        self._at = 0

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes, at most as many as the buffer takes. Returns their number, 0 at the end.

        Raises:
            ConnectionError: the file ends early. It can be tried again, as it may be on a share.
        """
        count = os.preadv(self._descriptor, [buffer], self._at)
        self._at += count
        if not count and len(buffer) and self._at < self._size:
            raise _ended_early(self._url, self._at, self._size)
        return count

    def seek(self, position: int) -> None:
        """Continue at a position."""
        self._at = position


def _ended_early(url: str, at: int, size: int) -> ConnectionError:
    return ConnectionError(f"{url}: the stream ended at byte {at} of {size}")


class Window:
    """A part of a stream in memory, from which pieces are taken without a copy.

    Args:
        readinto: reads the next bytes of the stream into a buffer, and returns their number, 0 at the end.
        ahead: bytes that are read at once.
        seek: lets the stream continue at a position; None: what is skipped is read.
    """

    def __init__(self, readinto: Callable[[Any], int], ahead: int, seek: Callable[[int], object] | None = None) -> None:
        self._readinto, self._ahead, self._seek = readinto, ahead, seek
        self._start = self.end = 0  # of the bytes in memory, in the stream
        self._held = memoryview(b"")
        self._damage: Exception | None = None  # what follows the bytes in memory cannot be decompressed

    def take(self, at: int, size: int) -> memoryview:
        """Return `size` bytes from a position on, fewer only at the end. Positions never decrease.

        Raises:
            ConnectionError: the stream ends early.
            EOFError, zlib.error, gzip.BadGzipFile: a compressed stream is cut or damaged before the end of the piece.
        """
        if at + size > self.end:
            self.fill(at, size)
            if self._damage is not None and at + size > self.end:
                raise self._damage
        begin = at - self._start
        return self._held[begin : begin + size]

    def rest(self, at: int) -> memoryview:
        """Return the bytes in memory from a position on."""
        return self._held[at - self._start :]

    def fill(self, at: int, size: int = 0) -> None:
        """Hold what follows a position: `size` bytes and more, unless the stream ends or is damaged before."""
        if at > self.end and self._seek is not None:
            self._seek(at)
            self.end = at
        while at > self.end:
            if not self._read(0, min(self._ahead, at - self.end)):
                return
        kept = self.end - at
        self._read(kept, max(size, self._ahead) - kept)

    def _read(self, kept: int, more: int) -> int:
        """Hold the last `kept` bytes, and up to `more` that follow them. Returns the number of new bytes."""
        held = np.empty(kept + max(0, more), np.uint8).data
        held[:kept] = self._held[len(self._held) - kept :]
        count = kept
        try:
            while self._damage is None and count < len(held) and (read := self._readinto(held[count:])):
                count += read
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._damage = error
        self._held, self._start = held[:count], self.end - kept
        self.end = self._start + count
        return count - kept
