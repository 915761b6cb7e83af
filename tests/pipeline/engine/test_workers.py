"""What travels to a worker does not grow with the run, and a processor releases what it holds."""

import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from extracting import REQUEST, extract
from making import HELPERS, write_shards

from saltern.pipeline.engine import conduct as module
from saltern.pipeline.engine.conduct import Job, RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.methods import Method
from saltern.pipeline.synthesis.visualize import VisualizeRequest, visualizing
from saltern.schemas.run import Run, Shard

pytestmark = pytest.mark.slow


class Stopped(Exception):  # noqa: N818
    """Ends a run before its pool is made."""


def bytes_to_a_worker(job: Job, out: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the bytes of the factory that a worker gets, in a run of so many shards."""
    sent: list[Any] = []

    def plan(*given: Any) -> tuple[Run, list[str]]:
        run, hints = job.plan(*given)
        many = [Shard(f"{number:06}", f"s3://bucket/in/{number:06}.tar", 10) for number in range(shards)]
        return replace(run, shards=many), hints

    def stop(engine: Any, factory: Any, *_: Any) -> None:
        sent.append(factory)
        raise Stopped

    monkeypatch.setattr(module, "make_pool", stop)
    with pytest.raises(Stopped):
        conduct(replace(job, plan=plan), RunOptions(str(out), engine="local", device="cpu"))
    return len(pickle.dumps(sent[0]))


@pytest.mark.parametrize("name", ["extract", "visualize-class"])
def test_the_bytes_to_a_worker_do_not_grow_with_the_shards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 1, 1)
    job = extraction(replace(REQUEST, shards=[str(tmp_path / "in")], torch_threads=1))
    if name == "visualize-class":
        job = visualizing(VisualizeRequest(model="making:tiny", classes="0"))
    few = bytes_to_a_worker(job, tmp_path / "few", 1, monkeypatch)
    many = bytes_to_a_worker(job, tmp_path / "many", 100_000, monkeypatch)
    assert many - few < 100
    assert many < 20_000


def test_a_run_in_this_process_leaves_no_threads_and_no_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    closed = []
    monkeypatch.setattr(Method, "close", lambda self: closed.append(self))
    write_shards(tmp_path / "in", 2, 3)
    before = set(threading.enumerate())
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("saltern")]
    assert [name for name in left if not name.startswith(("saltern-shard", "saltern-prefetch"))] == []
    assert closed
