"""Each error that Ray raises for an actor has an event that names its cause."""

import sys
from pathlib import Path

import pytest
from scripted import Notebook, shards

ray = pytest.importorskip("ray")
from ray.exceptions import RayActorError, RayError, RaySystemError, RayTaskError  # noqa: E402

from saltern.pipeline.engine.actors import RayPool, explain  # noqa: E402
from saltern.pipeline.engine.driver import Driver  # noqa: E402
from saltern.pipeline.engine.pool import Died, Raised  # noqa: E402
from saltern.schemas.errors import UserError  # noqa: E402

(SHARD,) = shards("ok")


def kinds(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*(kinds(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(kinds(RayError), key=str), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shard", [SHARD, None], ids=["a shard", "building"])
def test_no_error_of_ray_ends_the_run(kind: type[Exception], shard: object) -> None:
    class Made(kind):  # type: ignore[valid-type,misc]
        cause = None

        def __init__(self) -> None:
            pass

        def __str__(self) -> str:
            return "what Ray says\nabout it"

    event = explain(1, shard, Made(), machine_alive=True)  # type: ignore[arg-type]
    if issubclass(kind, RayTaskError):  # the worker's own code raised it
        assert isinstance(event, Raised)
    else:
        assert isinstance(event, Died)
        assert event.reason
        assert "\n" not in event.reason


def test_a_worker_that_ran_out_of_memory_is_blamed_with_this_reason() -> None:
    error = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")
    event = explain(1, SHARD, error, machine_alive=True)
    assert event == Died(1, "its node ran out of memory, and Ray ended it", blame=True)


@pytest.mark.parametrize(("alive", "blame"), [(True, True), (False, False)])
def test_a_dead_process_is_blamed_only_on_a_living_machine(alive: bool, blame: bool) -> None:
    text = "The actor died: The worker process has died. Worker exit detail: exit code 139. More"
    event = explain(1, SHARD, RayActorError(error_msg=text), machine_alive=alive)
    assert isinstance(event, Died)
    assert event.blame == blame
    assert ("exit code 139" in event.reason) == blame


def test_an_actor_whose_class_cannot_be_imported_is_no_lost_machine() -> None:
    text = "The actor died because of an error raised in its creation task\nModuleNotFoundError: No module named 'a'"
    event = explain(1, None, RayActorError(error_msg=text), machine_alive=True)
    assert isinstance(event, Raised)
    assert isinstance(event.error, UserError)
    assert "ModuleNotFoundError: No module named 'a'" in str(event.error)


def test_a_cluster_that_no_longer_answers_stops_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: object, **options: object) -> None:
        raise RaySystemError("broken pipe\nof the head")

    pool = RayPool.__new__(RayPool)
    vars(pool).update(_calls={}, _actors={}, _actor=type("Class", (), {"remote": lost}), _numbers=iter(range(9)))
    monkeypatch.setattr(RayPool, "close", lambda self: None)
    monkeypatch.setattr(ray, "wait", lost)
    outcome = Driver(pool, Notebook()).run([SHARD])
    assert outcome.stopped is not None
    assert "the Ray cluster no longer answers: System error: broken pipe of the head" in outcome.stopped
    pool._calls["ref"] = (0, None)
    with pytest.raises(ConnectionError, match="no longer answers"):
        pool.wait(0.0)


def test_a_cluster_without_a_living_node_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RayPool.__new__(RayPool)
    vars(pool).update(_calls={"ref": (0, None)}, _actors={}, _nodes={})
    monkeypatch.setattr(ray, "wait", lambda *args, **options: ([], []))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {}}])
    assert pool.wait(0.0) == []
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": False, "Resources": {}}])
    with pytest.raises(ConnectionError, match="lost its last node; repeat the command"):
        pool.wait(0.0)


def test_a_module_that_a_worker_cannot_import_is_named(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_the_driver_has_it.py").write_text("class Processor: ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_the_driver_has_it

    pool = RayPool(only_the_driver_has_it.Processor, gpus=0, cpus=1, torch_threads=1)
    with pytest.raises(UserError, match=r"cannot load the code.*No module named 'only_the_driver_has_it'"):
        Driver(pool, Notebook()).run(shards("ok"))
    del sys.modules["only_the_driver_has_it"]


def test_the_cause_of_an_error_in_a_processor_is_unchanged() -> None:
    error = RayTaskError("process", "traceback", ConnectionError("the wire is gone"), pid=1, ip="here", proctitle="p")
    event = explain(1, SHARD, error, machine_alive=True)
    assert isinstance(event, Raised)
    assert isinstance(event.error, ConnectionError)
    system = RayTaskError("build", "traceback", RaySystemError(OSError("odd")), pid=1, ip="here", proctitle="p")
    assert isinstance(explain(1, None, system, machine_alive=True), Raised)
