"""A pool without workers: a function says how each attempt at a shard ends."""

import itertools
from collections.abc import Callable

from saltern.pipeline.engine.pool import Died, Done, Event, Raised, Ready
from saltern.pipeline.runs.outlet import Made
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Shard

Script = Callable[[Shard, int], Receipt | BaseException | tuple[str, bool] | None]


class Scripted:
    """A pool whose attempts end one by one, the oldest first.

    Args:
        script: gets the shard and the number of its attempt, from 1. Returns a receipt, an error, the reason and the
            blame of a death, or None for an attempt that never ends.
    """

    def __init__(self, script: Script):
        self.isolated = True
        self.handed: list[str] = []  # names of shards, in order
        self.counts: dict[int, dict[str, int]] = {}  # images by worker and shard
        self._script, self._numbers = script, itertools.count()
        self._ready: list[Event] = []
        self._running: list[tuple[int, Shard]] = []

    def start(self) -> int:
        number = next(self._numbers)
        self._ready.append(Ready(number))
        self.counts[number] = {}
        return number

    def submit(self, worker: int, shard: Shard, earlier: Receipt | None) -> None:
        self.handed.append(shard.name)
        self._running.append((worker, shard))

    def wait(self, timeout_s: float) -> list[Event]:
        if self._ready:
            events, self._ready = self._ready, []
            return events
        for worker, shard in self._running:
            answer = self._script(shard, self.handed.count(shard.name))
            if answer is None:
                continue
            self._running.remove((worker, shard))
            if isinstance(answer, Receipt):
                return [Done(worker, shard, Made(answer, {}))]
            return [Raised(worker, shard, answer) if isinstance(answer, BaseException) else Died(worker, *answer)]
        return []

    def kill(self, worker: int) -> None:
        self._running = [(number, shard) for number, shard in self._running if number != worker]
        self.counts.pop(worker)

    def images(self) -> dict[str, int]:
        return {name: count for counts in self.counts.values() for name, count in counts.items()}

    def close(self) -> None:
        pass


class Notebook:
    """A record of results in memory."""

    def __init__(self) -> None:
        self.receipts: list[str] = []
        self.failures: dict[str, Failure] = {}

    def publish(self, made: Made) -> Receipt:
        self.receipts.append(made.receipt.shard)
        return made.receipt

    def failed(self, failure: Failure) -> None:
        self.failures[failure.shard] = failure


def shards(*urls: str) -> list[Shard]:
    """Return one shard for each URL, named by its number and URL."""
    return [Shard(f"{index}-{url}", url, 10) for index, url in enumerate(urls)]
