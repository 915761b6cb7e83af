"""Call the command line in this process, which is cheap, or in a process of its own, as a user does."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from making import HELPERS, PYTHONPATH

from saltern.jobs import main

Ended = subprocess.CompletedProcess[str]


def call(*words: str | Path) -> Ended:
    """Run `saltern` in this process, with the messages and the exit code of the real command."""
    line = ["saltern", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    process = ("keep_memory", "signals_as_interrupts", "exit_on_signals")  # they would change the process of all tests
    spared = mock.patch.multiple(main, **dict.fromkeys(process, mock.DEFAULT))
    with mock.patch.object(sys, "argv", line), spared, redirect_stdout(out), redirect_stderr(err):
        try:
            main.main()
        except SystemExit as ended:
            return Ended(line, int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() returned without an exit code")


def start(*words: str | Path, cwd: Path = HELPERS, **env: str) -> Ended:
    """Run `python -m saltern` in a process."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "200", **env}
    line = [sys.executable, "-m", "saltern", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def refused(ended: Ended) -> str:
    """Return the one line of a wrong call's error."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("saltern: ")
    return line
