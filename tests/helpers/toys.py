"""Small processors for the engine's tests. The shard's URL decides what a processor does."""

import os
import time
from pathlib import Path

from saltern.pipeline.runs.outlet import Made
from saltern.schemas.errors import DeviceLostError, OutputError, ShardError
from saltern.schemas.receipt import PHASES, Receipt
from saltern.schemas.run import Shard


def receipt(shard: Shard) -> Receipt:
    return Receipt(
        shard=shard.name,
        size=shard.size,
        fingerprint="f" * 16,
        samples=2,
        rows=2,
        statuses={"ok": 2},
        digest="",
        data_bytes=0,
        seconds={**dict.fromkeys(PHASES, 0.0), "total": 0.0},
        worker=str(os.getpid()),
    )


class Toy:
    """Processor that does what the URL says: ok, broken, network, network-once, code, hang-once, hang, die, die-once,
    lost, full."""

    def __init__(self, notes: str):
        self.images: dict[str, int] = {}
        self._notes = Path(notes)

    def _first(self, shard: Shard) -> bool:
        """Return whether this is the first call with the shard, in any process."""
        try:
            (self._notes / shard.name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        what, _, once = shard.url.partition("-")
        if not once or self._first(shard):
            self._act(what)
        return Made(receipt(shard), {})

    def close(self) -> None:
        (self._notes / "closed").touch()

    def _act(self, what: str) -> None:
        match what:
            case "broken":
                raise ShardError("cut at byte 7")
            case "network":
                raise ConnectionError("the wire is gone")
            case "code":
                raise ZeroDivisionError("a slip")
            case "lost":
                raise DeviceLostError("CUDA error: unspecified launch failure")
            case "full":
                raise OutputError("cannot write to RUN: No space left on device")
            case "hang":
                time.sleep(60)
            case "slow":
                time.sleep(0.3)
            case "die":
                time.sleep(0.2)
                os.kill(os.getpid(), 9)


class Unbuildable:
    """Processor that cannot be built."""

    def __init__(self) -> None:
        raise ValueError("no such model")


class Stillborn:
    """Processor whose process dies while it is built."""

    def __init__(self) -> None:
        os.kill(os.getpid(), 9)
