"""Runs of a slow method that tests disturb, and what must hold after them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import call
from making import HELPERS, PYTHONPATH, TINY, files

from saltern.pipeline.engine.conduct import RunResult
from saltern.pipeline.extract.extraction import extract
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.verify import verify

SHARDS, EACH = 8, 6
METHOD = ("--method", "odd_methods:Slow", "--map-dtype", "float32", "--target", "top1", "--batch-size", "4")
MODEL = tuple(word for word in TINY if word not in ("--layer", "body"))


def command(shards: Path, out: Path, *words: str, method: tuple[str, ...] = METHOD) -> list[str]:
    return [sys.executable, "-m", "saltern", "extract", str(shards), "--out", str(out), *MODEL, *method, *words]


def start(line: list[str], slow: float = 0.1, **more: object) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "SLOW": str(slow),
    }
    return subprocess.Popen(
        line, env=environment, cwd=HELPERS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )  # type: ignore[call-overload,no-any-return]


def finish(running: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    with running:
        said, _ = running.communicate(timeout=timeout_s)
    return running.returncode, said


def run(line: list[str], slow: float = 0.0, **more: object) -> tuple[int, str]:
    return finish(start(line, slow, **more))


def run_here(line: list[str]) -> tuple[int, str]:
    """Run a line of `command` in this process, which has joined the cluster: saves the start of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)  # of the actors
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(HELPERS)
        ended = call(*line[3:])
    return ended.returncode, ended.stdout + ended.stderr


def resume(shards: Path, out: Path, **more: Any) -> RunResult:
    """Repeat the command of `command` in this process, which saves the imports of a new process."""
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


def until(condition: Callable[[], bool], running: subprocess.Popen[str] | None = None, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert running is None or running.poll() is None, running.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def done(out: Path) -> int:
    return len(list(out.glob("receipts/*.json")))


def workers_of(out: Path) -> int:
    return len({json.loads(path.read_text())["worker"] for path in out.glob("receipts/*.json")})


def actors() -> list[psutil.Process]:
    """Return the live actors with a processor. The cluster has one job at a time."""
    return [process for process in psutil.process_iter() if _is_actor(process)]


def _is_actor(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::_Worker") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
