"""The driver tells a bad shard from a bad machine and from a broken environment, and names the cause."""

import pytest
import toys
from scripted import Notebook, Scripted, shards

from saltern.pipeline.engine import circuit, driver
from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.outcome import State
from saltern.pipeline.runs.outlet import Made
from saltern.schemas.errors import OutputError, ShardError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Shard

DENIED = PermissionError("AWS Error ACCESS_DENIED: the token has expired")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BACKOFF_S", (0.05, 0.05))
    monkeypatch.setattr(circuit, "PAUSES_S", (0.0,) * 5)


def test_a_shard_that_takes_its_machines_down_becomes_poison_and_the_rest_is_done() -> None:
    lost = ("its machine was lost", False)
    pool = Scripted(lambda shard, attempt: lost if "bad" in shard.url else toys.receipt(shard))
    book = Notebook()
    outcome = Driver(pool, book).run(shards("ok", "bad", *["ok"] * 20))
    assert list(book.failures) == ["1-bad"]
    assert book.failures["1-bad"].kind == "poison"
    assert "5 machines that were lost" in book.failures["1-bad"].reason
    assert pool.handed.count("1-bad") == driver.LOSSES
    assert len(outcome.receipts) == 21


def test_shards_of_a_preempted_machine_are_not_blamed() -> None:
    pool = Scripted(lambda shard, attempt: ("preempted", False) if attempt <= 3 else toys.receipt(shard))
    outcome = Driver(pool, Notebook()).run(shards("ok", "ok"))
    assert len(outcome.receipts) == 2
    assert not outcome.failures


def test_an_error_of_every_shard_stops_the_run_after_a_few() -> None:
    book = Notebook()
    pool = Scripted(lambda shard, attempt: DENIED)
    outcome = Driver(pool, book, workers=4).run(shards(*["ok"] * 1000))
    assert outcome.stopped is not None
    assert "shards in a row failed" in outcome.stopped
    assert "the token has expired" in outcome.stopped
    tried = set(pool.handed)
    assert len(pool.handed) <= 4 * driver.IN_FLIGHT + circuit.THRESHOLD + len(circuit.PAUSES_S)
    assert set(book.failures) == set(outcome.failures) == tried
    assert {failure.kind for failure in book.failures.values()} == {"world"}


def test_workers_that_die_of_every_shard_stop_the_run_too() -> None:
    pool = Scripted(lambda shard, attempt: ("segmentation fault", True))
    outcome = Driver(pool, Notebook()).run(shards(*["ok"] * 1000))
    assert outcome.stopped is not None
    assert "segmentation fault" in outcome.stopped
    assert len(outcome.failures) < 12


def test_an_outage_that_ends_costs_no_shard() -> None:
    left = [6]

    def script(shard: Shard, attempt: int) -> Receipt | BaseException:
        left[0] -= 1
        return DENIED if left[0] >= 0 else toys.receipt(shard)

    pool = Scripted(script)
    outcome = Driver(pool, Notebook()).run(shards(*["ok"] * 30))
    assert outcome.stopped is None
    assert not outcome.failures
    assert len(outcome.receipts) == 30


def test_many_bad_shards_among_good_ones_do_not_stop_the_run() -> None:
    pool = Scripted(lambda shard, attempt: DENIED if "bad" in shard.url else toys.receipt(shard))
    outcome = Driver(pool, Notebook()).run(shards(*["bad"] * 5, *["ok", "bad"] * 10))
    assert outcome.stopped is None
    assert len(outcome.receipts) == 10
    assert len(outcome.failures) == 15
    assert {failure.attempts for failure in outcome.failures.values()} == {3}


def test_the_last_shards_are_tried_three_times_even_if_none_succeeds() -> None:
    pool = Scripted(lambda shard, attempt: DENIED)
    outcome = Driver(pool, Notebook()).run(shards(*["bad"] * 4))
    assert outcome.stopped is None
    assert [failure.attempts for failure in outcome.failures.values()] == [3] * 4


def test_a_run_waits_for_a_shard_in_flight_before_it_stops() -> None:
    ends = [60]  # polls until the long shard ends

    def script(shard: Shard, attempt: int) -> Receipt | BaseException | None:
        ends[0] -= 1
        if "long" in shard.url:
            return None if ends[0] > 0 else toys.receipt(shard)
        return DENIED if ends[0] > 0 else toys.receipt(shard)

    outcome = Driver(Scripted(script), Notebook(), workers=2).run(shards("long", *["ok"] * 40))
    assert outcome.stopped is None
    assert len(outcome.receipts) == 41


class Broken(Notebook):
    """A record in a store that refuses something."""

    def __init__(self, error: Exception, *, refuses: str) -> None:
        super().__init__()
        self.error, self._refuses = error, refuses

    def publish(self, made: Made) -> Receipt:
        if self._refuses == made.receipt.shard:
            raise self.error
        return super().publish(made)

    def failed(self, failure: Failure) -> None:
        if self._refuses == "failures":
            raise self.error
        super().failed(failure)


def test_a_store_that_refuses_one_result_fails_that_shard_after_three_attempts() -> None:
    pool = Scripted(lambda shard, attempt: toys.receipt(shard))
    outcome = Driver(pool, Broken(ConnectionError("reset by peer"), refuses="1-ok")).run(shards("ok", "ok", "ok"))
    assert list(outcome.receipts) == ["0-ok", "2-ok"]
    assert outcome.failures["1-ok"].reason == "ConnectionError: reset by peer (3 attempts)"


@pytest.mark.parametrize("error", [OSError("AWS Error SLOW_DOWN\nretry"), OutputError("cannot write to RUN: full")])
def test_a_store_that_refuses_the_record_of_a_failure_stops_the_run_in_one_line(error: Exception) -> None:
    pool = Scripted(lambda shard, attempt: ShardError("cut") if attempt else None)
    outcome = Driver(pool, Broken(error, refuses="failures")).run(shards("bad", "ok"))
    assert outcome.stopped is not None
    assert "\n" not in outcome.stopped
    assert str(error).split("\n")[0] in outcome.stopped


@pytest.mark.parametrize("error", [ConnectionError("no weights"), MemoryError("the model does not fit")])
def test_a_worker_that_cannot_be_built_by_its_environment_is_built_again_and_then_stops_the_run(
    error: Exception,
) -> None:
    from saltern.pipeline.engine.local import LocalPool

    tries = []

    def factory() -> toys.Toy:
        tries.append(1)
        raise error

    outcome = Driver(LocalPool(factory), Notebook()).run(shards("ok"))
    assert len(tries) == driver.STILLBORN + 1
    assert outcome.stopped is not None
    assert str(error) in outcome.stopped


def test_the_images_of_a_dead_worker_are_not_counted_twice() -> None:
    seen: list[int] = []
    notes: list[str] = []

    def script(shard: Shard, attempt: int) -> Receipt | tuple[str, bool] | None:
        for worker in list(pool.counts)[-1:]:
            pool.counts[worker] = {shard.name: 1}  # of its two
        if attempt == 1 and shard.name == "2-ok":
            return ("killed", True)
        return toys.receipt(shard)

    pool = Scripted(script)

    def tick(state: State) -> None:
        seen.append(state.images)
        notes.extend(state.notes)
        state.notes.clear()

    outcome = Driver(pool, Notebook(), tick=tick).run(shards(*["ok"] * 5))
    assert outcome.samples == 10
    assert max(seen) <= 10
    assert seen[-1] == 10
    assert outcome.lost == 0
    assert any("1 image to do again" in note for note in notes)


def test_what_an_interrupt_loses_is_counted_in_images() -> None:
    pool = Scripted(lambda shard, attempt: None if shard.name == "1-ok" else toys.receipt(shard))

    def tick(state: State) -> None:
        pool.counts[0] = {"0-ok": 2, "1-ok": 1}  # an old count of a finished shard, and one in process
        if state.images == 3:
            raise KeyboardInterrupt

    drive = Driver(pool, Notebook(), tick=tick)
    with pytest.raises(KeyboardInterrupt):
        drive.run(shards("ok", "ok"))
    assert (drive.state.outcome.samples, drive.state.outcome.lost) == (2, 1)


def test_a_failed_shard_is_said_once() -> None:
    notes: list[str] = []

    def tick(state: State) -> None:
        notes.extend(state.notes)
        state.notes.clear()

    pool = Scripted(lambda shard, attempt: ShardError("cut at byte 7") if "bad" in shard.url else toys.receipt(shard))
    Driver(pool, Notebook(), tick=tick).run(shards("bad", "ok"))
    assert [note for note in notes if "cut at byte 7" in note] == ["0-bad: data: cut at byte 7"]
