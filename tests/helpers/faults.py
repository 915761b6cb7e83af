"""Runs of a slow method that tests disturb, and what must hold after them."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import call
from forked import Forked, Forks
from making import HELPERS, PYTHONPATH, TINY, files

from saltern.pipeline.engine.conduct import RunResult
from saltern.pipeline.extract.extraction import extract
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.verify import verify

SHARDS, EACH = 8, 6
METHOD = ("--method", "odd_methods:Slow", "--map-dtype", "float32", "--target", "top1", "--batch-size", "4")
MODEL = tuple(word for word in TINY if word not in ("--layer", "body"))


def command(shards: Path, out: Path, *words: str, method: tuple[str, ...] = METHOD) -> list[str]:
    """Return the words of `saltern`."""
    return ["extract", str(shards), "--out", str(out), *MODEL, *method, *words]


def start(forks: Forks, line: list[str], slow: float = 0.1, **more: Any) -> Forked:
    return forks.start(line, {"SLOW": str(slow)}, **more)


def finish(forks: Forks, running: Forked) -> tuple[int, str]:
    return running.wait(), forks.said()


def run(forks: Forks, line: list[str], slow: float = 0.0, **more: Any) -> tuple[int, str]:
    return finish(forks, start(forks, line, slow, **more))


def run_here(line: list[str]) -> tuple[int, str]:
    """Run a line of `command` in this process, which has joined the cluster: saves the start of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)  # of the actors
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(HELPERS)
        ended = call(*line)
    return ended.returncode, ended.stdout + ended.stderr


def resume(shards: Path, out: Path, **more: Any) -> RunResult:
    """Repeat the command of `command` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOW", "0")
        patch.chdir(HELPERS)
        result = extract(
            shards, out, model="making:tiny", method="odd_methods:Slow", resize=40, crop=32, map_dtype="float32",
            target="top1", batch_size=4, torch_threads=1, device="cpu", engine="local", **more,
        )  # fmt: skip
    assert result.code == 0, result
    return result


def equals(out: Path, undisturbed: dict[str, bytes]) -> None:
    assert files(out) == undisturbed
    verdict = verify(*load_run_folder(str(out)))
    assert verdict.findings == []
    assert (verdict.rows, verdict.recounted) == (SHARDS * EACH, SHARDS)
    assert not [path for path in out.rglob("*") if path.name.startswith(("_tmp-", "."))]


def until(condition: Callable[[], bool], running: Forked | None = None, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert running is None or running.poll() is None, running.returncode
        assert time.monotonic() < end
        time.sleep(0.02)


def done(out: Path) -> int:
    return len(list(out.glob("receipts/*.json")))


def workers_of(out: Path) -> int:
    return len({json.loads(path.read_text())["worker"] for path in out.glob("receipts/*.json")})


def actors(kind: str) -> list[psutil.Process]:
    """Return the live actors of a class, in the cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ray::{kind}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
