"""The driver. It owns the queue of shards, gives each worker two at a time, and handles every kind of failure.

- Broken data: the shard fails at once.
- Broken environment (network, memory): the shard is retried later, by any worker.
- Dead worker: its shards go to other workers; a shard that has killed three workers, or was in flight on five machines
  that were lost, fails as poison.
- Lost device of a worker that shares this process: the run stops, to be continued by a new process.
- Broken environment of every shard: a circuit breaker stops the run (see circuit.py).
- Broken code: the run stops.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from saltern.pipeline.engine.circuit import Circuit
from saltern.pipeline.engine.outcome import Outcome, State
from saltern.pipeline.engine.pool import Died, Done, Event, Pool, Raised, Ready
from saltern.schemas.errors import DeviceLostError, OutputError, ShardError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Shard
from saltern.schemas.text import counted

IN_FLIGHT = 2  # shards of a worker at a time: it reads one while it finishes the other
ATTEMPTS = 3  # of a shard whose environment is broken, whose time runs out or whose worker dies
LOSSES = 5  # machines that may be lost with a shard in flight; a preempted machine is no fault of its shards
STILLBORN = 5  # consecutive workers that may fail before they are ready
BACKOFF_S = (1.0, 5.0)  # before the second and the third attempt
TICK_S = 0.25
DEVICE = "device"  # kind of the failure of a shard that was in flight when this process lost its device
PUBLISHERS = 32  # threads: publishing takes an object store seven requests, one after the other


class Book(Protocol):
    """The record of results: the run's folder."""

    def publish(self, made: Any) -> Receipt:
        """Publish a shard's files, then its receipt. Runs in several threads. May raise OSError or OutputError."""

    def failed(self, failure: Failure) -> None: ...


class Records(Protocol):
    """What processors get of shards that have receipts."""

    def get(self, shard: str, /) -> Any: ...


@dataclass
class _Flight:
    shard: Shard
    since: float


class Driver:
    """A driver of shards through a pool of workers.

    Args:
        pool: the driver starts its workers and closes it.
        book: the record of results.
        workers: how many to start; work begins when the first is ready.
        timeout_s: limit of one shard, from its submission to a worker; None = no limit.
        max_failed: stop when more shards than this have failed; None = never.
        earlier: what a processor gets of shards that have receipts, by the shard's name.
        kills: workers or processes that earlier drives lost with a shard in flight, by its name. It runs last, alone.
        tick: called a few times a second.
    """

    def __init__(
        self,
        pool: Pool,
        book: Book,
        *,
        workers: int = 1,
        timeout_s: float | None = None,
        max_failed: int | None = None,
        earlier: Records | None = None,
        kills: Mapping[str, int] | None = None,
        tick: Callable[[State], None] = lambda state: None,
    ):
        self._pool, self._book, self._workers = pool, book, workers
        self._timeout_s, self._max_failed, self._earlier, self._tick = timeout_s, max_failed, earlier or {}, tick
        self._queue: deque[Shard] = deque()  # shards that have not failed
        self._later: list[tuple[float, Shard]] = []
        self._retries: deque[Shard] = deque()  # failed shards whose pause is over
        # A shard whose worker died or hung is a suspect. It runs with no other shard, so that no other is blamed.
        self._kills: dict[str, int] = dict(kills or {})
        self._suspected: set[str] = set(self._kills)
        self._suspects: deque[Shard] = deque()  # suspects that wait for a worker
        self._flights: dict[int, dict[str, _Flight]] = {}  # by ready worker
        # A shard is in flight or being published, never both, so two attempts cannot publish at once.
        self._publisher = ThreadPoolExecutor(PUBLISHERS, "saltern-publish")
        self._publishing: dict[Future[Receipt], tuple[Shard, int]] = {}  # with its images
        self._attempts: dict[str, int] = {}
        self._losses: dict[str, int] = {}  # machines that were lost with the shard in flight
        self._living: set[int] = set()
        self._circuit = Circuit()
        self._stillborn = 0  # consecutive workers that failed before they were ready

    def run(self, shards: Iterable[Shard]) -> Outcome:
        """Drive all shards to a receipt or a failure.

        An error of the environment that belongs to no shard, as a store that refuses the record of a failure, stops
        the run.

        Raises:
            Any error in a processor's code, unchanged.
        """
        shards = list(shards)
        self._queue.extend(shard for shard in shards if shard.name not in self._kills)
        late = [shard for shard in shards if shard.name in self._kills]
        self._last = deque(sorted(late, key=lambda shard: self._kills[shard.name]))
        self.state = State(Outcome(), len(shards), wanted=self._workers)
        try:
            self._living = {self._pool.start() for _ in range(self._workers)}
            while self._unfinished() and self.state.outcome.stopped is None:
                self._assign()
                for event in self._pool.wait(self._patience()):
                    # Skip events of workers that an earlier event in this batch removed.
                    if event.worker in self._living:
                        self._handle(event)
                self._collect()
                self._expire()
                self.state.workers = len(self._flights)
                published = self.state.outcome.samples + sum(images for _, images in self._publishing.values())
                self.state.images = published + self._images(self._flights)
                self._tick(self.state)
        except (OSError, OutputError) as error:
            self.state.outcome.stopped = _one_line(error)
        finally:
            self._pool.close()
            self._publisher.shutdown()
            for future in self._publishing:  # of a drive that was stopped
                if future.exception() is None:
                    self.state.outcome.add(future.result())
            self.state.outcome.lost = max(0, self.state.images - self.state.outcome.samples)
        return self.state.outcome

    def _patience(self) -> float:
        """Return how long to wait for workers. If none is busy, wait for a publication first."""
        if not self._publishing or any(self._flights.values()):
            return TICK_S
        wait(self._publishing, TICK_S, FIRST_COMPLETED)
        return 0.0

    def _collect(self) -> None:
        """Take the results of finished publications."""
        for future in [future for future in self._publishing if future.done()]:
            shard, _ = self._publishing.pop(future)
            if (error := future.exception()) is not None:
                self._judge(shard, error)
                continue
            self.state.outcome.add(future.result())
            self._circuit.close()

    def _unfinished(self) -> bool:
        waiting = self._queue or self._later or self._retries or self._suspects or self._last
        return bool(waiting or self._publishing or any(self._flights.values()))

    def _images(self, workers: Iterable[int]) -> int:
        """Return the finished images of the shards that these workers have in flight."""
        counts = self._pool.images()
        return sum(counts.get(name, 0) for worker in workers for name in self._flights.get(worker, ()))

    def _assign(self) -> None:
        now = time.monotonic()
        for due, shard in self._later:
            if due <= now:
                (self._suspects if shard.name in self._suspected else self._retries).append(shard)
        self._later = [(due, shard) for due, shard in self._later if due > now]
        if self._circuit.is_open and self._queue:
            return self._assign_one()
        for slots in range(IN_FLIGHT):  # the first of every worker before the second of any
            for worker, flights in self._flights.items():
                if len(flights) == slots and self._suspected.isdisjoint(flights):
                    idle = (self._suspects,) if not flights else ()
                    last = (self._last,) if not flights else ()
                    self._submit(worker, self._next(*idle, self._retries, self._queue, *last))

    def _assign_one(self) -> None:
        """Try one shard that has not failed yet, or stop the run if enough of them have failed in a row."""
        if self._circuit.exhausted and not self._publishing and not any(self._flights.values()):
            return self._stop_failing()
        free = (worker for worker, flights in self._flights.items() if len(flights) < IN_FLIGHT)
        worker = next(free, None) if self._circuit.admits() else None
        if worker is not None and (shard := self._next(self._queue)):
            self._circuit.trying(shard.name)
            self._submit(worker, shard)

    def _stop_failing(self) -> None:
        failed = list(self._circuit.failed.values())
        for failure in failed:
            if failure.shard not in self.state.outcome.failures:
                self._record(failure)
        self.state.outcome.stopped = f"{len(failed)} shards in a row failed, the last by: {failed[-1].reason}"

    def _submit(self, worker: int, shard: Shard | None) -> None:
        if shard is not None:
            self._flights[worker][shard.name] = _Flight(shard, time.monotonic())
            self._pool.submit(worker, shard, self._earlier.get(shard.name))

    def _next(self, *sources: deque[Shard]) -> Shard | None:
        """Return the next shard, from the first source that has one."""
        for source in sources:
            if source:
                return source.popleft()
        return None

    def _handle(self, event: Event) -> None:
        match event:
            case Ready(worker):
                self._flights[worker] = {}
                self._stillborn = 0
            case Done(worker, shard, made):
                self._flights[worker].pop(shard.name, None)
                self._publishing[self._publisher.submit(self._book.publish, made)] = shard, made.receipt.samples
            case Raised(worker, _, DeviceLostError() as error) if not self._pool.isolated:
                self._leave(worker, f"lost its device: {error}")
            case Raised(worker, None, OSError() | MemoryError() | DeviceLostError() as error):
                self._replace(worker, _one_line(error))
            case Raised(_, None, error):
                raise error
            case Raised(worker, _, DeviceLostError() as error):
                self._blame(self._replace(worker, f"lost its device: {error}"), f"lost its device: {error}")
            case Raised(worker, shard, error) if shard is not None:
                self._flights[worker].pop(shard.name, None)
                self._judge(shard, error)
            case Died(worker, reason, blame):
                shards = self._replace(worker, reason)
                self._blame(shards, reason) if blame else self._return(shards, reason)

    def _judge(self, shard: Shard, error: BaseException) -> None:
        if isinstance(error, ShardError):
            self._circuit.close()  # the tar was read
            self._fail(shard, "data", str(error))
        elif isinstance(error, OutputError):
            self.state.outcome.stopped = str(error)
        elif isinstance(error, OSError | MemoryError):
            self._again(shard, "world", _one_line(error))
        else:
            raise error

    def _again(self, shard: Shard, kind: str, reason: str) -> None:
        attempts = self._attempts[shard.name] = self._attempts.get(shard.name, 0) + 1
        self._count(Failure(shard.name, kind, reason, attempts))
        if attempts >= ATTEMPTS:
            return self._fail(shard, kind, f"{reason} ({counted(attempts, 'attempt')})")
        pause = BACKOFF_S[attempts - 1]
        self._say(f"{shard.name}: {reason}; trying again in {pause:g} s")
        self._later.append((time.monotonic() + pause, shard))

    def _blame(self, shards: list[Shard], reason: str) -> None:
        """Retry the shards whose worker died, or give up those that have killed enough workers."""
        for shard in shards:
            self._suspected.add(shard.name)
            kills = self._kills[shard.name] = self._kills.get(shard.name, 0) + 1
            self._count(Failure(shard.name, "poison", reason, kills))
            if kills >= ATTEMPTS:
                self._fail(shard, "poison", f"killed its worker {kills} times: {reason}")
            else:
                self._suspects.append(shard)

    def _leave(self, worker: int, reason: str) -> None:
        """Stop the run, because this process cannot use its device any more, and blame the shards in flight."""
        flights = self._flights.pop(worker, {})
        self._living.discard(worker)
        tried = []
        for flight in flights.values():
            name = flight.shard.name
            kills = self._kills[name] = self._kills.get(name, 0) + 1
            tried.append(kills < ATTEMPTS)
            self._book.failed(Failure(name, DEVICE, reason, kills))
        waiting = [*self._queue, *self._retries, *(shard for _, shard in self._later), *self._suspects]
        fresh = waiting or any(self._kills[shard.name] < ATTEMPTS for shard in self._last)
        outcome = self.state.outcome
        # A new process has a chance only with shards that have not cost three processes already.
        outcome.device_lost = bool(flights) and bool(fresh or any(tried))
        outcome.stopped = f"this process {reason}"

    def _return(self, shards: list[Shard], reason: str) -> None:
        """Queue the shards of a lost machine again, or give up those that have lost enough machines."""
        for shard in shards:
            losses = self._losses[shard.name] = self._losses.get(shard.name, 0) + 1
            if losses >= LOSSES:
                self._fail(shard, "poison", f"was in flight on {losses} machines that were lost: {reason}")
            elif losses == 1:
                self._queue.appendleft(shard)
            else:
                self._suspected.add(shard.name)
                self._suspects.append(shard)

    def _count(self, failure: Failure) -> None:
        if self._circuit.fail(failure):
            self._say(f"{len(self._circuit.failed)} shards in a row failed; trying one shard at a time, with pauses")

    def _fail(self, shard: Shard, kind: str, reason: str) -> None:
        counts = (counted.get(shard.name, 0) for counted in (self._attempts, self._kills, self._losses))
        self._record(Failure(shard.name, kind, reason, max(1, *counts)))

    def _record(self, failure: Failure) -> None:
        failures = self.state.outcome.failures
        failures[failure.shard] = failure
        self._book.failed(failure)
        self._say(f"{failure.shard}: {failure.kind}: {failure.reason}")
        if self._max_failed is not None and len(failures) > self._max_failed:
            limit = f"--max-failed-shards is {self._max_failed}"
            self.state.outcome.stopped = f"{counted(len(failures), 'shard')} failed, {limit}"

    def _replace(self, worker: int, reason: str) -> list[Shard]:
        """Replace a lost worker. Return the shards that it had in flight."""
        lost = self._images([worker])
        self._stillborn += worker not in self._flights
        if self._stillborn > STILLBORN:
            self.state.outcome.stopped = f"workers fail before they are ready: {reason}"
        flights = self._flights.pop(worker, {})
        self._living.remove(worker)
        self._pool.kill(worker)
        if self.state.outcome.stopped is None:
            self._living.add(self._pool.start())
        again = f"{counted(lost, 'image')} to do again" if lost else "no image was lost"
        self._say(f"a worker was replaced ({reason}); in flight: {', '.join(flights) or 'nothing'}; {again}")
        return [flight.shard for flight in flights.values()]

    def _expire(self) -> None:
        """Retry the shards that exceeded their time limit. Only the end of its worker stops a shard for certain."""
        if self._timeout_s is None:
            return
        now = time.monotonic()
        for worker, flights in list(self._flights.items()):
            late = {name for name, flight in flights.items() if now - flight.since > self._timeout_s}
            if not late:
                continue
            for shard in self._replace(worker, "a shard ran out of time"):
                if shard.name in late:
                    self._suspected.add(shard.name)
                    self._again(shard, "timeout", f"not done after --shard-timeout {self._timeout_s:g} s")
                else:
                    self._queue.appendleft(shard)

    def _say(self, text: str) -> None:
        self.state.notes.append(text)


def _one_line(error: BaseException) -> str:
    name = "" if isinstance(error, OutputError) else f"{type(error).__name__}: "
    return name + " ".join(str(error).split())
