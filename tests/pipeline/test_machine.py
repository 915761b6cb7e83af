"""This process on a machine without the calls that only Linux has."""

import ctypes
import os
import signal
import threading
from pathlib import Path
from typing import Any

import extracting
import pytest
import torchcodec.decoders  # noqa: F401 - it needs ctypes.CDLL, which a test replaces
from making import write_shard

from saltern.pipeline import machine

ROOT = Path(__file__).parents[2]
LINUX = ("sched_getaffinity", "sched_setaffinity", "mallopt", "/proc/", "/sys/fs/")


@pytest.fixture
def without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away CPU affinity, mallopt, /proc and control groups."""
    for name in ("sched_getaffinity", "sched_setaffinity", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    read = Path.read_text

    def read_text(self: Path, *args: Any, **options: Any) -> str:
        if self.parts[:2] in (("/", "proc"), ("/", "sys")):
            raise FileNotFoundError(self)
        return read(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.usefixtures("without_linux")
def test_functions_fall_back() -> None:
    assert machine.cores() == os.cpu_count()
    assert machine.available_memory() is None
    machine.keep_memory()


@pytest.mark.usefixtures("without_linux")
def test_an_extract_needs_no_call_of_linux(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a-0.tar", 2)
    assert extracting.extract(tmp_path / "in", tmp_path / "run", torch_threads=None) == 0


def test_only_machine_and_the_benchmarks_use_calls_of_linux() -> None:
    for package in ("schemas", "pipeline", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name != "pipeline/machine.py" and not name.startswith("pipeline/bench/"):
                assert not [call for call in LINUX if call in path.read_text()], name


def test_sigterm_is_an_interrupt_in_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), machine.sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_is_left_alone_in_other_threads() -> None:
    entered = []

    def enter() -> None:
        with machine.sigterm_as_interrupt():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]
