"""Read many files at a time, in order, with bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = 32  # a request to an object store waits for tens of milliseconds
MAX_BYTES = 2**26  # of the results that are read or wait for the consumer
_FIRST = 4  # results that are read before the size of one is known


def read_ahead(
    read: Callable[[T], R], items: Iterable[T], threads: int = THREADS, size: Callable[[R], int] = lambda result: 0
) -> Generator[R, None, None]:
    """Yield `read(item)` for each item, in order. An error is raised when its item is due.

    Memory does not grow with the items.

    Args:
        read: called in threads.
        items: in the order of the results.
        threads: largest number of results that are read or wait for the consumer.
        size: returns a result's bytes. If the next results are as large, all have at most MAX_BYTES, unless it is one.
    """
    with ThreadPoolExecutor(threads, "saltern-read") as pool:
        waiting: deque[Future[R]] = deque()
        room = min(threads, _FIRST)
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                while len(waiting) >= room:
                    result = waiting.popleft().result()
                    room = max(1, min(threads, MAX_BYTES // max(1, size(result))))
                    yield result
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
