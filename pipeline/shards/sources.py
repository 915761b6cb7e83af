"""The bytes of shards: streams, and files of this machine, that tell an early end from the end.

An early end is a broken connection, which can be tried again.
"""

import io
import os
from typing import Any

_DIRECT, _PAGE = 2**14, 2**12  # bytes: of the pieces of a file that are read at once; of what is read after one


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
            raise ended_early(self._url, self._at, self._size)
        return count


class LocalFile:
    """A local file of known length. Large pieces are read without a copy by Python, which would hold the GIL.

    Args:
        descriptor: of the open file.
        url: for messages.
        size: bytes of the file.
        ahead: bytes that are read at once for the small pieces; the first ones after a large piece are read in a page.
    """

    def __init__(self, descriptor: int, url: str, size: int, ahead: int) -> None:
        self._descriptor, self._url, self._size, self._ahead = descriptor, url, size, ahead
        self._at = self._start = 0  # of the next byte, and of those that are held
        self._held, self._next = b"", ahead

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file.

        Raises:
            ConnectionError: the file ends early. It can be tried again, as it may be on a share.
        """
        at, self._at = self._at, self._at + size
        begin = at - self._start
        if begin < 0 or begin + size > len(self._held):
            if size >= _DIRECT:
                self._next = min(_PAGE, self._ahead)
                data = self._pread(size, at)
                self._at = at + len(data)
                return data
            self._held, self._start, begin = self._pread(max(self._next, size), at), at, 0
            self._next = self._ahead
        data = self._held[begin : begin + size]
        self._at = at + len(data)
        return data

    def seek(self, position: int) -> None:
        """Continue at a position."""
        self._at = position

    def _pread(self, size: int, at: int) -> bytes:
        data = os.pread(self._descriptor, size, at)
        while len(data) < size and at + len(data) < self._size:
            more = os.pread(self._descriptor, size - len(data), at + len(data))
            if not more:
                raise ended_early(self._url, at + len(data), self._size)
            data += more
        return data


def ended_early(url: str, at: int, size: int) -> ConnectionError:
    """Return the error of a stream that ends before its known length."""
    return ConnectionError(f"{url}: the stream ended at byte {at} of {size}")
