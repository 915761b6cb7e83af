"""Workers behind one face: what the driver asks of them, and the ones that live in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Shard


class ShardProcessor(Protocol):
    """What a worker holds: built once, then fed with shards, two at once."""

    images: int

    def process(self, shard: Shard, redo: bool = False) -> Receipt: ...


Factory = Callable[[], ShardProcessor]


@dataclass(frozen=True)
class Ready:
    """A worker has built its processor."""

    worker: int


@dataclass(frozen=True)
class Done:
    worker: int
    shard: Shard
    receipt: Receipt


@dataclass(frozen=True)
class Raised:
    """`process`, or with no shard the building of the processor, raised an error."""

    worker: int
    shard: Shard | None
    error: BaseException


@dataclass(frozen=True)
class Died:
    """A worker's process is gone, and with it all that it had in flight."""

    worker: int
    reason: str  # in words, one line
    blame: bool  # False where its whole machine went


Event = Ready | Done | Raised | Died


class Pool(Protocol):
    """Workers by number. A number is never used again."""

    def start(self) -> int:
        """Begin to make a worker; `Ready` follows when it stands."""

    def submit(self, worker: int, shard: Shard, redo: bool) -> None: ...

    def wait(self, timeout_s: float) -> list[Event]:
        """What has happened; waits for the first event, at most so long. Nothing is said of killed workers."""

    def kill(self, worker: int) -> None: ...

    def images(self) -> int:
        """Images that the living workers have finished since they were made."""

    def close(self) -> None: ...
