"""The driver: owns the queue of shards, feeds workers two at a time, and decides what follows from what went wrong.

Data is broken: the shard fails, once. The world is broken: the shard is tried again, later, elsewhere. A worker dies:
its shards go to others, and one that has killed three is poison. The code is broken: everything stops.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from saltern.pipeline.engine.pool import Died, Done, Event, Pool, Raised, Ready
from saltern.schemas.errors import DeviceLostError, OutputError, ShardError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Shard

IN_FLIGHT = 2  # shards of a worker: one is read while the other is finished
ATTEMPTS = 3  # of a shard, where the world is broken, its time runs out or its worker dies
STILLBORN = 5  # workers in a row that may die before they are ready
BACKOFF_S = (1.0, 5.0)  # before the second and the third attempt
TICK_S = 0.25


class Book(Protocol):
    """Where results stand: the run's folder."""

    def standing(self, shard: Shard) -> Receipt | None:
        """The receipt, where the shard is done by now (another driver may have done it)."""

    def succeeded(self, receipt: Receipt) -> None: ...

    def failed(self, failure: Failure) -> None: ...


@dataclass
class Outcome:
    """How a drive ended."""

    receipts: dict[str, Receipt] = field(default_factory=dict)  # of this drive, by shard
    failures: dict[str, Failure] = field(default_factory=dict)
    elsewhere: int = 0  # shards that another driver finished meanwhile
    stopped: str | None = None  # why it ended early, in words


@dataclass
class State:
    """What is under way; the progress line reads it."""

    outcome: Outcome
    total: int  # shards
    workers: int = 0  # ready
    wanted: int = 0  # workers asked for
    images: int = 0  # finished, those of unfinished shards included
    says: list[str] = field(default_factory=list)  # notes for the user, one line each, taken by the progress line


@dataclass
class _Flight:
    shard: Shard
    since: float


class Driver:
    """Drives shards through a pool.

    Args:
        pool: of workers; the driver starts `workers` of them and closes it.
        book: where results stand.
        workers: how many to start; work begins with the first that is ready.
        timeout_s: of one shard, from the moment it is handed to a worker; None for no limit.
        max_failed: stop when more shards than this have failed; None for never.
        redo: hand on to the processor (redo the rows that are not ok).
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
        redo: bool = False,
        tick: Callable[[State], None] = lambda state: None,
    ):
        self._pool, self._book, self._workers = pool, book, workers
        self._timeout_s, self._max_failed, self._redo, self._tick = timeout_s, max_failed, redo, tick
        self._queue: deque[Shard] = deque()
        self._later: list[tuple[float, Shard]] = []
        self._suspects: deque[Shard] = deque()  # of those suspected, the ones that wait
        self._suspected: set[str] = set()  # their worker died or hung: each runs alone, so that no neighbour is blamed
        self._flights: dict[int, dict[str, _Flight]] = {}  # by ready worker
        self._attempts: dict[str, int] = {}
        self._kills: dict[str, int] = {}
        self._living: set[int] = set()
        self._image_base = 0
        self._stillborn = 0  # workers that died before they were ready, in a row

    def run(self, shards: Iterable[Shard]) -> Outcome:
        """Drive all shards to a receipt or a failure.

        Raises:
            Whatever the code raised that is no fault of data or world, as it is.
        """
        self._queue.extend(shards)
        self.state = State(Outcome(), len(self._queue), wanted=self._workers)
        try:
            self._living = {self._pool.start() for _ in range(self._workers)}
            while self._unfinished() and self.state.outcome.stopped is None:
                self._assign()
                for event in self._pool.wait(TICK_S):
                    if event.worker in self._living:  # one event may tell of the end of a worker that another is of
                        self._handle(event)
                self._expire()
                self.state.workers = len(self._flights)
                self.state.images = max(self.state.images, self._image_base + self._pool.images())
                self._tick(self.state)
        finally:
            self._pool.close()
        return self.state.outcome

    def _unfinished(self) -> bool:
        return bool(self._queue or self._later or self._suspects or any(self._flights.values()))

    def _assign(self) -> None:
        now = time.monotonic()
        for due, shard in self._later:
            if due <= now:
                (self._suspects if shard.name in self._suspected else self._queue).append(shard)
        self._later = [(due, shard) for due, shard in self._later if due > now]
        for slots in range(IN_FLIGHT):  # the first of every worker before the second of any
            for worker, flights in self._flights.items():
                if len(flights) == slots and not self._alone(flights):
                    found = self._next(alone=not flights)
                    if found is not None:
                        flights[found.name] = _Flight(found, now)
                        self._pool.submit(worker, found, self._redo)

    def _alone(self, flights: dict[str, _Flight]) -> bool:
        return not self._suspected.isdisjoint(flights)

    def _next(self, alone: bool) -> Shard | None:
        """The next shard that still needs doing; one under suspicion only for a worker that has nothing else."""
        for source in (self._suspects, self._queue) if alone else (self._queue,):
            while source:
                shard = source.popleft()
                if self._redo or self._book.standing(shard) is None:
                    return shard
                self.state.outcome.elsewhere += 1
        return None

    def _handle(self, event: Event) -> None:
        match event:
            case Ready(worker):
                self._flights[worker] = {}
                self._stillborn = 0
            case Done(worker, shard, receipt):
                self._flights[worker].pop(shard.name, None)
                self.state.outcome.receipts[shard.name] = receipt
                self._book.succeeded(receipt)
            case Raised(_, None, error):
                raise error
            case Raised(worker, shard, DeviceLostError() as error):
                self._replace(worker, f"lost its device: {error}", blame=True)
            case Raised(worker, shard, error) if shard is not None:
                self._flights[worker].pop(shard.name, None)
                self._judge(shard, error)
            case Died(worker, reason, blame):
                self._replace(worker, reason, blame)

    def _judge(self, shard: Shard, error: BaseException) -> None:
        if isinstance(error, ShardError):
            self._fail(shard, "data", str(error))
        elif isinstance(error, OutputError):
            self.state.outcome.stopped = str(error)
        elif isinstance(error, OSError | MemoryError):
            self._again(shard, "world", f"{type(error).__name__}: {error}")
        else:
            raise error

    def _again(self, shard: Shard, kind: str, reason: str) -> None:
        reason = reason.splitlines()[0]
        attempts = self._attempts[shard.name] = self._attempts.get(shard.name, 0) + 1
        if attempts >= ATTEMPTS:
            return self._fail(shard, kind, f"{reason} ({attempts} attempts)")
        pause = BACKOFF_S[attempts - 1]
        self._say(f"{shard.name}: {reason}; trying again in {pause:g} s")
        self._later.append((time.monotonic() + pause, shard))

    def _fail(self, shard: Shard, kind: str, reason: str) -> None:
        attempts = max(1, self._attempts.get(shard.name, 0), self._kills.get(shard.name, 0))
        failure = Failure(shard.name, kind, reason, attempts)
        failures = self.state.outcome.failures
        failures[shard.name] = failure
        self._book.failed(failure)
        self._say(f"{shard.name} FAILED: {reason}")
        if self._max_failed is not None and len(failures) > self._max_failed:
            self.state.outcome.stopped = (
                f"{len(failures)} shards have failed, --max-failed-shards is {self._max_failed}"
            )

    def _replace(self, worker: int, reason: str, blame: bool) -> None:
        """A worker is gone: make another, and give its shards to whoever is free."""
        self._image_base = self.state.images
        self._stillborn += worker not in self._flights
        if self._stillborn > STILLBORN:
            self.state.outcome.stopped = f"workers die before they are ready: {reason}"
        flights = self._flights.pop(worker, {})
        self._living.remove(worker)
        self._pool.kill(worker)
        self._living.add(self._pool.start())
        names = ", ".join(flights) or "nothing"
        self._say(f"a worker is gone ({reason}) with {names} in flight; made anew")
        for flight in flights.values():
            name = flight.shard.name
            if not blame:
                self._queue.appendleft(flight.shard)
                continue
            self._suspected.add(name)
            self._kills[name] = self._kills.get(name, 0) + 1
            if self._kills[name] >= ATTEMPTS:
                self._fail(flight.shard, "poison", f"killed its worker {self._kills[name]} times: {reason}")
            else:
                self._suspects.append(flight.shard)

    def _expire(self) -> None:
        """Shards past their time limit. Nothing but the end of its worker ends one for sure."""
        if self._timeout_s is None:
            return
        now = time.monotonic()
        for worker, flights in list(self._flights.items()):
            late = [flight.shard for flight in flights.values() if now - flight.since > self._timeout_s]
            for shard in late:
                del flights[shard.name]
                self._suspected.add(shard.name)
                self._again(shard, "timeout", f"not done after --shard-timeout {self._timeout_s:g} s")
            if late:
                self._replace(worker, "a shard ran out of time", blame=False)

    def _say(self, text: str) -> None:
        self.state.says.append(text)
