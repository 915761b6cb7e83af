"""Files are read many at a time, in order, and few of them wait."""

import threading

import pytest

from saltern.pipeline.storage import ahead
from saltern.pipeline.storage.ahead import read_ahead


class Reader:
    """Returns its items, and notes how many were begun."""

    def __init__(self, size: int = 0):
        self.begun, self._size, self._lock = 0, size, threading.Lock()

    def __call__(self, item: int) -> int:
        with self._lock:
            self.begun += 1
        return item

    def size(self, item: int) -> int:
        return self._size


def most_ahead(reader: Reader, items: int = 50, threads: int = 8) -> list[int]:
    """Return how many items were begun beyond each one when it came."""
    found = []
    for done, item in enumerate(read_ahead(reader, range(items), threads, reader.size)):
        assert item == done
        found.append(reader.begun - done)
    assert reader.begun == items
    return found


def test_all_items_come_in_order_and_at_most_so_many_are_read() -> None:
    assert max(most_ahead(Reader())) <= 8


def test_all_threads_read_at_a_time() -> None:
    together = threading.Barrier(8, timeout=60)
    waiting = read_ahead(lambda item: together.wait() if item >= 8 else 0, range(16), 8)
    assert len(list(waiting)) == 16


def test_large_items_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", 100)
    assert max(most_ahead(Reader(50))[1:]) <= 3  # two, and the one that is due
    assert max(most_ahead(Reader(1000))[ahead._FIRST :]) == 1  # one is always read


def test_an_error_comes_when_its_item_is_due() -> None:
    results = read_ahead(lambda item: 1 // (item - 2), range(5))
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_consumer_that_stops_ends_the_reading() -> None:
    reader = Reader()
    results = read_ahead(reader, range(1000), 8)
    assert next(results) == 0
    results.close()
    assert reader.begun <= 8
