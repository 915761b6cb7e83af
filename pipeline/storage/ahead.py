"""Read many files at a time, in order, with bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = 32  # a request to an object store waits for tens of milliseconds


def read_ahead(read: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Generator[R, None, None]:
    """Yield `read(item)` for each item, in order. An error is raised when its item is due.

    At most `threads` results are read or wait for the consumer, so memory does not grow with the items.
    """
    with ThreadPoolExecutor(threads, "saltern-read") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) == threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
