"""Runs in forked processes, which a test can signal and kill. One process imports everything, once, and forks them.

As a program: reads one request, a JSON object, from each line of its input, and answers with the process and its end.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from making import HELPERS, PYTHONPATH

# Events of Python's audit hook by which a run changes its folder.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree")


class Forked:
    """A forked run, with some methods of `Popen`."""

    def __init__(self, pid: int, answer: Callable[[], int]):
        self.pid, self.returncode = pid, None
        self._answer = answer

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended the run; None if it goes on."""
        if self.returncode is None:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                self.returncode = self._answer()
        return self.returncode

    def wait(self, timeout_s: float = 120) -> int:
        """Return what `poll` does, after the end. A run that takes longer is killed."""
        end = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that forks runs, one at a time."""

    def __init__(self, log: Path):
        self._log, self._last = log, None
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=HELPERS, text=True, **pipes)

    def run(
        self,
        shards: Path,
        out: str,
        *,
        at: int = 0,
        begun: Callable[[int], None] = lambda pid: None,
        environment: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        **wishes: Any,
    ) -> int:
        """Run `extract` to its end, or to a kill.

        Args:
            at: the change of the folder `out` before which the process kills itself; 0 = none.
            begun: gets the number of the process.

        Returns:
            The exit code, or minus the signal that killed the run.
        """
        ask = {"shards": str(shards), "out": out, "at": at, "settings": settings or {}, "wishes": wishes}
        running = self._start(ask, environment or {})
        begun(running.pid)
        return running.wait()

    def start(self, words: list[str], environment: dict[str, str], file_size: int | None = None) -> Forked:
        """Start `saltern` with these words.

        Args:
            file_size: limit of the bytes of a file that it writes.
        """
        return self._start({"words": words, "file_size": file_size}, environment)

    def _start(self, ask: dict[str, Any], environment: dict[str, str]) -> Forked:
        if self._last is not None and self._last.poll() is None:  # of a test that failed
            self._last.kill()
            self._last.wait()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**ask, "environment": environment, "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        self._last = Forked(self._answer(), self._answer)
        return self._last

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def said(self) -> str:
        """Return the output of the last run. Of `run`, its last line has the number of changes, without a kill."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Reaper:
    """An audit hook that kills the process before its n-th change of a folder."""

    def __init__(self, folder: str, at: int):
        self.changes, self._folder, self._at = 0, folder, at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not self._concerns(event, arguments):
            return
        self.changes += 1
        if self.changes == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _concerns(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event in ("os.truncate", "fcntl.flock"):
            return True  # of an open file: only the lock's
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return writes and str(arguments[0]).startswith(self._folder)


def _child(ask: dict[str, Any]) -> int:
    log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(ask["environment"])
    return _command(ask) if "words" in ask else _run(ask)


def _command(ask: dict[str, Any]) -> int:
    """Run the command line, which ends the process as that of a user."""
    from saltern.jobs.main import main

    if ask["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ask["file_size"], ask["file_size"]))
    sys.argv = ["saltern", *ask["words"]]
    main()
    raise AssertionError("main() returned without an exit code")


def _run(ask: dict[str, Any]) -> int:
    from extracting import extract

    from saltern.schemas.errors import UserError

    os.fsync = lambda file: None  # waits for the disk, and a kill loses nothing that was written
    reaper = Reaper(ask["out"], ask["at"])
    sys.addaudithook(reaper)
    try:
        code = extract(ask["shards"], ask["out"], ask["settings"], **ask["wishes"])
    except UserError as error:
        print(error)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 3
    print(reaper.changes, flush=True)
    return code


def main() -> None:
    import extracting  # noqa: F401
    import odd_methods  # noqa: F401
    import pandas  # noqa: F401  (pyarrow imports it for the first column, which takes longer than a run)
    import pyarrow.compute
    import pyarrow.pandas_compat  # noqa: F401
    import pydantic.type_adapter  # noqa: F401
    import ray  # noqa: F401
    import torch

    import saltern.jobs.main  # noqa: F401
    from saltern.pipeline.shards.decoder import decode_jpeg

    decode_jpeg()
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a fork would write to, and so copy, the memory of all objects
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_child(json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
