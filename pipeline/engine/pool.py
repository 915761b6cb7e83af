"""The interface between the driver and its workers: processors, pools and their events."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from saltern.pipeline.runs.outlet import Earlier, Made, MadeTogether
from saltern.schemas.run import Shard


class ShardProcessor(Protocol):
    """The processor of a worker. It is built once, then called with shards, two at a time.

    It writes into the scratch folder; `earlier` is the receipt of a shard whose data file may be kept in whole or part.
    A processor of several runs gets the names of the runs that lack the shard, each with its earlier receipt, and
    returns the parts of these.
    """

    images: dict[str, int]  # finished images, by shard in process

    def process(self, shard: Shard, earlier: Any = None) -> Any: ...

    def close(self) -> None:
        """Release threads, hooks and device memory. No shard is in process."""


Factory = Callable[[], ShardProcessor]


@dataclass(frozen=True)
class Ready:
    """The event of a worker that has built its processor."""

    worker: int


@dataclass(frozen=True)
class Done:
    """The event of a worker that has finished a shard."""

    worker: int
    shard: Shard
    made: Made | MadeTogether


@dataclass(frozen=True)
class Raised:
    """The event of an error in `process` or, if shard is None, in building the processor."""

    worker: int
    shard: Shard | None
    error: BaseException


@dataclass(frozen=True)
class Died:
    """The event of a worker whose process ended, with shards in flight."""

    worker: int
    reason: str  # one line
    blame: bool  # the shards in flight may be the cause; False if the whole machine was lost


Event = Ready | Done | Raised | Died


class Pool(Protocol):
    """Workers by number. A number is never reused."""

    isolated: bool  # each worker is a process: the end of one costs no other

    def start(self) -> int:
        """Start a worker and return its number; `Ready` follows."""

    def submit(self, worker: int, shard: Shard, earlier: Earlier) -> None: ...

    def wait(self, timeout_s: float) -> list[Event]:
        """Wait for the first event, at most `timeout_s`, and return all events, except of killed workers."""

    def kill(self, worker: int) -> None: ...

    def images(self) -> dict[str, int]:
        """Return the finished images of the shards that the living workers process, by shard."""

    def close(self) -> None:
        """End all workers. Idle ones release what they hold."""
