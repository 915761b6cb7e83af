"""Two attempts at one shard whose bytes differ: the receipt is of the data, whenever the abandoned one ends."""

import hashlib
import threading
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saltern.pipeline.engine import driver
from saltern.pipeline.engine.book import Book
from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.pool import Died, Event
from saltern.pipeline.runs.begin import Begun
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.storage.session import session
from saltern.pipeline.storage.store import Store
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run, Shard

MOMENTS = ("before the second publishes", "between its data and its receipt", "after its receipt")


class Gates:
    """Where the first attempt is stopped, and when it goes on."""

    def __init__(self) -> None:
        self.go, self.ended, self.attempts = threading.Event(), threading.Event(), 0

    def release(self) -> None:
        self.go.set()
        assert self.ended.wait(20)


class Differing:
    """Processor whose every attempt writes other bytes. The first attempt hangs at a gate, then hands in its output."""

    def __init__(self, spec: Spec, gates: Gates):
        self.images: dict[str, int] = {}
        self._outlet, self._gates = Outlet(spec), gates

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        self._gates.attempts += 1
        attempt, tally = self._gates.attempts, Tally()
        with self._outlet.open(pa.schema([("attempt", pa.int64())]), tally) as writer:
            writer.write(pa.record_batch({"attempt": pa.array([attempt], pa.int64())}))
            if attempt == 1:
                assert self._gates.go.wait(20)
            made = self._outlet.close(shard, writer, tally, 1)
        if attempt == 1:
            self._gates.ended.set()
        return made

    def close(self) -> None: ...


class Watched(Book):
    """The record, which releases the first attempt at a moment of the publication."""

    def __init__(self, *given: object, gates: Gates, moment: str):
        super().__init__(*given)  # type: ignore[arg-type]
        self._gates, self._moment = gates, moment

    def publish(self, made: Made) -> Receipt:
        if self._moment == MOMENTS[0]:
            self._gates.release()
        if self._moment == MOMENTS[1]:
            write = self.store.write

            def released(name: str, content: bytes) -> None:
                self._gates.release()
                write(name, content)

            self.store.write = released  # type: ignore[method-assign]
        receipt = super().publish(made)
        self._gates.release()
        return receipt


class Partitioned(LocalPool):
    """A pool whose first worker cannot be reached after a moment, and goes on."""

    lost = False

    def wait(self, timeout_s: float) -> list[Event]:
        if not self.lost and 0 in self._workers and self._workers[0].busy:
            self.lost = True
            return [Died(0, "its machine was lost or cannot be reached", blame=False)]
        return super().wait(timeout_s)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("engine", ["time limit", "lost machine"])
def test_a_receipt_is_of_the_data_of_its_own_attempt(
    tmp_path: Path, moment: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "BACKOFF_S", (0.01, 0.02))
    store, gates = Store(str(tmp_path / "run")), Gates()
    run = Run(None, [], {}, "f" * 16)  # type: ignore[arg-type]
    with session(store) as held:
        spec = Spec(run, str(tmp_path / "run"), held.scratch, "cpu", 1)
        book = Watched(store, held.lock, Begun({}, {}, set(), {}), gates=gates, moment=moment)
        pool = (LocalPool if engine == "time limit" else Partitioned)(partial(Differing, spec, gates))
        limit = 2.0 if engine == "time limit" else None
        outcome = Driver(pool, book, timeout_s=limit).run([Shard("a", "a", 1)])
    assert gates.ended.is_set()
    assert list(outcome.receipts) == ["a"]
    data = (tmp_path / "run/data/a.parquet").read_bytes()
    receipt = Receipt.from_json((tmp_path / "run/receipts/a.json").read_bytes())
    assert hashlib.sha256(data).hexdigest() == receipt.digest
    assert pq.read_table(tmp_path / "run/data/a.parquet")["attempt"].to_pylist() != [1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data", "receipts"]
