"""Run an iterator ahead of its consumer, in a thread."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
MAX_BYTES = 2**28  # of the items that wait for their consumer


def prefetch(
    items: Callable[[], Iterable[T]], depth: int, size: Callable[[T], int] = lambda item: 0
) -> Generator[T, None, None]:
    """Yield the items of `items()`, read ahead.

    The thread ends when the consumer closes the generator. An error in `items()` is raised in the consumer.

    Args:
        items: called in the thread.
        depth: largest number of items that wait for the consumer.
        size: returns an item's bytes. All that wait have at most MAX_BYTES together, unless it is one item.
    """
    ahead: deque[tuple[T, int]] = deque()
    changed = threading.Condition()
    held = 0  # bytes of the items in `ahead`
    closed = ended = False
    error: BaseException | None = None

    def put(item: T) -> bool:
        nonlocal held
        with changed:
            own = size(item)
            changed.wait_for(lambda: closed or not ahead or (len(ahead) < depth and held + own <= MAX_BYTES))
            ahead.append((item, own))
            held += own
            changed.notify_all()
            return not closed

    def run() -> None:
        nonlocal ended, error
        try:
            all(put(item) for item in items())
        except BaseException as raised:  # raised in the consumer
            error = raised
        with changed:
            ended = True
            changed.notify_all()

    threading.Thread(target=run, name="saltern-prefetch", daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ahead or ended)
                if not ahead:
                    break
                item, own = ahead.popleft()
                held -= own
                changed.notify_all()
            yield item
        if error is not None:
            raise error
    finally:
        with changed:
            closed = True
            changed.notify_all()
