"""The driver handles each kind of failure, with both kinds of workers."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
import toys
from making import PYTHONPATH
from scripted import Notebook, shards

from saltern.pipeline.engine import driver
from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.outcome import State
from saltern.pipeline.engine.pool import Pool
from saltern.pipeline.runs.outlet import Made
from saltern.schemas.errors import OutputError
from saltern.schemas.receipt import Failure, Receipt

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BACKOFF_S", (0.01, 0.02))


@pytest.fixture(autouse=True)
def helpers_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


@pytest.fixture
def local(tmp_path: Path) -> LocalPool:
    return LocalPool(partial(toys.Toy, str(tmp_path)))


@pytest.fixture
def actors(tmp_path: Path, ray_address: str) -> Pool:
    from saltern.pipeline.engine.actors import RayPool

    return RayPool(partial(toys.Toy, str(tmp_path)), gpus=0, cpus=1, torch_threads=1)


@pytest.fixture(params=["local", "actors"])
def pool(request: pytest.FixtureRequest) -> Pool:
    made: Pool = request.getfixturevalue(request.param)
    return made


def test_every_shard_once(pool: Pool) -> None:
    book = Notebook()
    outcome = Driver(pool, book).run(shards(*["ok"] * 20))
    assert sorted(book.receipts) == sorted(shard.name for shard in shards(*["ok"] * 20))
    assert not outcome.failures
    assert outcome.stopped is None


def test_a_pool_that_closes_closes_its_processors(local: LocalPool, tmp_path: Path) -> None:
    Driver(local, Notebook()).run(shards("ok"))
    assert (tmp_path / "closed").exists()


def test_a_killed_worker_is_closed_when_its_last_shard_ends(local: LocalPool, tmp_path: Path) -> None:
    Driver(local, Notebook(), timeout_s=0.1, max_failed=0).run(shards(*["slow"] * 2))
    assert local.abandoned
    for _ in range(100):
        if (tmp_path / "closed").exists():
            return
        time.sleep(0.05)
    pytest.fail("the processor was not closed")


def test_broken_data_fails_at_once_and_the_rest_goes_on(pool: Pool) -> None:
    book = Notebook()
    outcome = Driver(pool, book).run(shards("ok", "broken", "ok"))
    assert book.receipts == ["0-ok", "2-ok"] or sorted(book.receipts) == ["0-ok", "2-ok"]
    assert outcome.failures["1-broken"] == Failure("1-broken", "data", "cut at byte 7", 1)
    assert book.failures == outcome.failures


def test_a_broken_world_is_tried_three_times(pool: Pool) -> None:
    book = Notebook()
    outcome = Driver(pool, book).run(shards("network-once", "network", "ok"))
    assert sorted(book.receipts) == ["0-network-once", "2-ok"]
    failure = outcome.failures["1-network"]
    assert (failure.kind, failure.attempts) == ("world", 3)
    assert "the wire is gone" in failure.reason


def test_broken_code_stops_everything(pool: Pool) -> None:
    with pytest.raises(ZeroDivisionError, match="a slip"):
        Driver(pool, Notebook()).run(shards("code", *["slow"] * 50))


def test_a_full_disk_stops_with_words(pool: Pool) -> None:
    outcome = Driver(pool, Notebook()).run(shards("full", *["slow"] * 50))
    assert outcome.stopped == "cannot write to RUN: No space left on device"
    assert len(outcome.receipts) < 50


def test_max_failed_stops(pool: Pool) -> None:
    outcome = Driver(pool, Notebook(), max_failed=1).run(shards("broken", "broken", *["slow"] * 50))
    assert outcome.stopped is not None
    assert "2 shards failed" in outcome.stopped
    assert len(outcome.receipts) < 50


def test_a_shard_past_its_time_goes_to_a_new_worker(pool: Pool) -> None:
    book = Notebook()
    since = time.monotonic()
    outcome = Driver(pool, book, timeout_s=2.0).run(shards("hang-once", "ok", "ok"))
    assert sorted(book.receipts) == ["0-hang-once", "1-ok", "2-ok"]
    assert not outcome.failures
    assert time.monotonic() - since < 50  # it did not wait for the sleeper


def test_a_shard_that_always_hangs_fails(local: LocalPool) -> None:
    outcome = Driver(local, Notebook(), timeout_s=0.3).run(shards("hang", "ok"))
    failure = outcome.failures["0-hang"]
    assert (failure.kind, failure.attempts) == ("timeout", 3)
    assert "1-ok" in outcome.receipts
    assert local.abandoned


class Replaced(Notebook):
    """A record in a run that another driver has taken over."""

    def publish(self, made: Made) -> Receipt:
        raise OutputError("the run was taken over")


def test_a_publication_that_is_refused_stops_the_run(local: LocalPool) -> None:
    outcome = Driver(local, Replaced()).run(shards(*["ok"] * 30))
    assert outcome.stopped == "the run was taken over"
    assert not outcome.receipts


def test_a_lost_device_gets_a_new_actor(actors: Pool) -> None:
    book = Notebook()
    outcome = Driver(actors, book).run(shards("lost-once", "ok"))
    assert sorted(book.receipts) == ["0-lost-once", "1-ok"]
    assert not outcome.failures


def test_a_device_that_this_process_lost_stops_the_run_for_another_process(local: LocalPool) -> None:
    book = Notebook()
    outcome = Driver(local, book).run(shards("lost", "slow"))
    assert outcome.device_lost
    assert outcome.stopped == "this process lost its device: CUDA error: unspecified launch failure"
    assert {failure.kind for failure in book.failures.values()} == {"device"}


def test_an_error_while_building_is_the_users_to_see(ray_address: str) -> None:
    from saltern.pipeline.engine.actors import RayPool

    for pool in (
        LocalPool(toys.Unbuildable),
        RayPool(toys.Unbuildable, gpus=0, cpus=1, torch_threads=1),
    ):
        with pytest.raises(ValueError, match="no such model"):
            Driver(pool, Notebook()).run(shards("ok"))


def test_poison_is_quarantined_and_its_neighbours_are_not(actors: Pool) -> None:
    book = Notebook()
    outcome = Driver(actors, book, workers=2).run(shards("ok", "die", "slow", "slow", "die-once", "ok", "ok"))
    assert list(outcome.failures) == ["1-die"]
    assert (outcome.failures["1-die"].kind, outcome.failures["1-die"].attempts) == ("poison", 3)
    assert sorted(book.receipts) == ["0-ok", "2-slow", "3-slow", "4-die-once", "5-ok", "6-ok"]


def test_a_killed_actor_is_made_anew(actors: Pool) -> None:
    killed = []

    def kill_once(state: State) -> None:
        if not killed and state.outcome.receipts:
            killed.append(int(next(iter(state.outcome.receipts.values())).worker))
            os.kill(killed[0], 9)

    book = Notebook()
    outcome = Driver(actors, book, tick=kill_once).run(shards(*["slow"] * 6))
    assert killed
    assert len(book.receipts) == 6
    assert len({receipt.worker for receipt in outcome.receipts.values()}) == 2


def test_workers_that_never_stand_stop_the_run(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from saltern.pipeline.engine.actors import RayPool

    monkeypatch.setattr(driver, "STILLBORN", 1)
    pool = RayPool(toys.Stillborn, gpus=0, cpus=1, torch_threads=1)
    outcome = Driver(pool, Notebook()).run(shards("ok"))
    assert outcome.stopped is not None
    assert "before they are ready" in outcome.stopped
