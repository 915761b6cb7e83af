"""An iterator runs ahead of its consumer, by a number of items and of bytes."""

import threading
import time
from collections.abc import Iterator

import pytest

from saltern.pipeline.shards import prefetch as module
from saltern.pipeline.shards.prefetch import prefetch


def settled(read: list[int]) -> int:
    """Return how many items were read, once the number no longer grows."""
    count = -1
    while count != len(read):
        count = len(read)
        time.sleep(0.1)
    return count


def reading(read: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        read.append(number)
        yield number


@pytest.mark.parametrize("depth", [1, 3, 1000])
def test_all_items_in_order(depth: int) -> None:
    assert list(prefetch(lambda: range(500), depth, lambda item: item)) == list(range(500))


def test_items_ahead_are_bounded_by_number() -> None:
    read: list[int] = []
    items = prefetch(lambda: reading(read, 100), 5)
    assert next(items) == 0
    assert settled(read) == 7  # one is used, five wait, one is in the reader's hand
    items.close()


def test_items_ahead_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    read: list[int] = []
    items = prefetch(lambda: reading(read, 100), 50, lambda item: 300)
    assert next(items) == 0
    assert settled(read) == 5  # one is used, three wait, one is in the reader's hand
    assert list(items) == list(range(1, 100))


def test_an_item_larger_than_the_bound_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert list(prefetch(lambda: range(5), 50, lambda item: 5000)) == list(range(5))


def test_an_error_comes_after_the_items_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = prefetch(broken, 5)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_the_thread_ends_with_its_consumer() -> None:
    def threads() -> int:
        return sum(thread.name == "saltern-prefetch" for thread in threading.enumerate())

    before = threads()
    ended = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.set()

    items = prefetch(endless, 2)
    next(items)
    assert threads() == before + 1
    items.close()
    assert ended.wait(5)
