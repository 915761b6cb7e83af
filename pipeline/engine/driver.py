"""The driver. It owns the queue of shards, gives each worker two at a time, and handles every kind of failure.

- Broken data: the shard fails at once.
- Broken environment (network, memory): the shard is retried later, by any worker.
- Dead worker: its shards go to other workers; a shard that has killed three workers fails as poison.
- Broken code: the run stops.
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

IN_FLIGHT = 2  # shards of a worker at a time: it reads one while it finishes the other
ATTEMPTS = 3  # of a shard whose environment is broken, whose time runs out or whose worker dies
STILLBORN = 5  # consecutive workers that may die before they are ready
BACKOFF_S = (1.0, 5.0)  # before the second and the third attempt
TICK_S = 0.25


class Book(Protocol):
    """The record of results: the run's folder."""

    def receipt_of(self, shard: Shard) -> Receipt | None:
        """Return the receipt if the shard is done; another driver may have done it."""

    def succeeded(self, receipt: Receipt) -> None: ...

    def failed(self, failure: Failure) -> None: ...


@dataclass
class Outcome:
    """The result of a drive."""

    receipts: dict[str, Receipt] = field(default_factory=dict)  # of this drive, by shard
    failures: dict[str, Failure] = field(default_factory=dict)
    elsewhere: int = 0  # shards that another driver finished meanwhile
    stopped: str | None = None  # why it ended early


@dataclass
class State:
    """The state of a drive, as the progress line shows it."""

    outcome: Outcome
    total: int  # shards
    workers: int = 0  # ready
    wanted: int = 0  # workers that were started
    images: int = 0  # finished, including those of unfinished shards
    notes: list[str] = field(default_factory=list)  # lines for the user, which the progress line prints and removes


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
        redo: passed to the processor (redo the rows that are not ok).
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
        # A shard whose worker died or hung is a suspect. It runs with no other shard, so that no other is blamed.
        self._suspected: set[str] = set()
        self._suspects: deque[Shard] = deque()  # suspects that wait for a worker
        self._flights: dict[int, dict[str, _Flight]] = {}  # by ready worker
        self._attempts: dict[str, int] = {}
        self._kills: dict[str, int] = {}
        self._living: set[int] = set()
        self._image_base = 0
        self._stillborn = 0  # consecutive workers that died before they were ready

    def run(self, shards: Iterable[Shard]) -> Outcome:
        """Drive all shards to a receipt or a failure.

        Raises:
            Any error in a processor's code, unchanged.
        """
        self._queue.extend(shards)
        self.state = State(Outcome(), len(self._queue), wanted=self._workers)
        try:
            self._living = {self._pool.start() for _ in range(self._workers)}
            while self._unfinished() and self.state.outcome.stopped is None:
                self._assign()
                for event in self._pool.wait(TICK_S):
                    # Skip events of workers that an earlier event in this batch removed.
                    if event.worker in self._living:
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
                if len(flights) == slots and self._suspected.isdisjoint(flights):
                    following = self._next(idle=not flights)
                    if following is not None:
                        flights[following.name] = _Flight(following, now)
                        self._pool.submit(worker, following, self._redo)

    def _next(self, idle: bool) -> Shard | None:
        """Return the next shard that is not done; a suspect only for an idle worker."""
        for source in (self._suspects, self._queue) if idle else (self._queue,):
            while source:
                shard = source.popleft()
                if self._redo or self._book.receipt_of(shard) is None:
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
        """Replace a lost worker, and queue its shards again."""
        self._image_base = self.state.images
        self._stillborn += worker not in self._flights
        if self._stillborn > STILLBORN:
            self.state.outcome.stopped = f"workers die before they are ready: {reason}"
        flights = self._flights.pop(worker, {})
        self._living.remove(worker)
        self._pool.kill(worker)
        self._living.add(self._pool.start())
        names = ", ".join(flights) or "nothing"
        self._say(f"a worker was replaced ({reason}); in flight: {names}")
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
        """Retry the shards that exceeded their time limit. Only the end of its worker stops a shard for certain."""
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
        self.state.notes.append(text)
