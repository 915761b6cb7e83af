"""Runs of `extract` in forked processes, which a test can kill. One process imports everything, once, and forks them.

As a program: reads one request, a JSON object, from each line of its input, and answers with the process and its end.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from making import HELPERS, PYTHONPATH

# Events of Python's audit hook by which a run changes its folder.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree")


class Forks:
    """The process that forks runs."""

    def __init__(self, log: Path, **environment: str):
        self._log = log
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **environment}
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
        ask = {"shards": str(shards), "out": out, "at": at, "environment": environment or {}, "log": str(self._log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**ask, "settings": settings or {}, "wishes": wishes}) + "\n")
        self._process.stdin.flush()
        begun(self._answer())
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def said(self) -> str:
        """Return the output of the last run. Its last line has the number of changes, if the run was not killed."""
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


def _run(ask: dict[str, Any]) -> int:
    from extracting import extract

    from saltern.schemas.errors import UserError

    log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(ask["environment"])
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
    import pyarrow.compute  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_run(json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
