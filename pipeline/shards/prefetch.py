"""Run an iterator ahead of its consumer, in a thread."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1


class _End(Generic[T]):
    """The end of the items, with the error that caused it."""

    def __init__(self, error: BaseException | None):
        self.error = error


def prefetch(items: Callable[[], Iterable[T]], depth: int) -> Generator[T, None, None]:
    """Yield the items of `items()`, read at most `depth` items ahead.

    The thread ends when the consumer closes the generator. An error in `items()` is raised in the consumer.
    """
    ahead: queue.Queue[T | _End[T]] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | _End[T]) -> None:
        while not closed.is_set():
            try:
                return ahead.put(item, timeout=_POLL_S)
            except queue.Full:
                continue

    def run() -> None:
        error: BaseException | None = None
        try:
            for item in items():
                put(item)
                if closed.is_set():
                    return
        except BaseException as raised:  # raised in the consumer
            error = raised
        put(_End(error))

    threading.Thread(target=run, name="saltern-prefetch", daemon=True).start()
    try:
        while not isinstance(item := ahead.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
