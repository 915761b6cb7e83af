"""Worker threads of this process."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from saltern.pipeline.engine.pool import Done, Event, Factory, Raised, Ready, ShardProcessor
from saltern.pipeline.runs.outlet import Earlier
from saltern.schemas.run import Shard


@dataclass
class _Local:
    processor: ShardProcessor | None = None
    busy: set[str] = field(default_factory=set)  # shard names
    killed: bool = False

    def release(self) -> None:
        """Close the processor of a killed worker when none of its threads is in it any more."""
        if self.killed and not self.busy and self.processor is not None:
            with contextlib.suppress(Exception):  # a lost device cannot be released
                self.processor.close()
            self.processor = None


class LocalPool:
    """Worker threads of this process. A thread can be abandoned but not killed."""

    isolated = False

    def __init__(self, factory: Factory):
        self._factory = factory
        self._events: queue.Queue[Event] = queue.Queue()
        self._workers: dict[int, _Local] = {}
        self._numbers = itertools.count()
        self.abandoned = False  # a thread is stuck: leave the process with os._exit

    def start(self) -> int:
        number = next(self._numbers)
        self._workers[number] = _Local()
        self._thread(self._build, number, self._workers[number])
        return number

    def _thread(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, name="saltern-shard", daemon=True).start()

    def _build(self, number: int, worker: _Local) -> None:
        try:
            worker.processor = self._factory()
            worker.release()
            self._events.put(Ready(number))
        except BaseException as error:  # the driver raises it
            self._events.put(Raised(number, None, error))

    def submit(self, worker: int, shard: Shard, earlier: Earlier) -> None:
        self._workers[worker].busy.add(shard.name)
        self._thread(self._process, worker, self._workers[worker], shard, earlier)

    def _process(self, number: int, worker: _Local, shard: Shard, earlier: Earlier) -> None:
        assert worker.processor is not None  # noqa: S101 - the driver waits for Ready
        try:
            event: Event = Done(number, shard, worker.processor.process(shard, earlier))
        except BaseException as error:  # the driver handles it
            event = Raised(number, shard, error)
        worker.busy.discard(shard.name)
        worker.release()
        self._events.put(event)

    def wait(self, timeout_s: float) -> list[Event]:
        try:
            events = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return [event for event in events if event.worker in self._workers]

    def kill(self, worker: int) -> None:
        killed = self._workers.pop(worker)
        self.abandoned |= bool(killed.busy)
        killed.killed = True
        killed.release()

    def images(self) -> dict[str, int]:
        processors = (worker.processor for worker in self._workers.values() if worker.processor)
        return {name: count for processor in processors for name, count in list(processor.images.items())}

    def close(self) -> None:
        for number in list(self._workers):
            self.kill(number)
