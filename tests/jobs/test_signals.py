"""A signal ends a command with the code and the message that the documentation gives, also in its last moments."""

import os
import subprocess
import sys

import pytest
from making import PYTHONPATH

PROGRAM = """
import atexit, os, signal
from saltern.jobs import main

def app(**options):
    {body}

main.app = app
main.main()
"""
KILL = "os.kill(os.getpid(), signal.{})"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("body", "ended"),
    [
        (KILL, (130, "saltern: interrupted\n")),
        (f"atexit.register(lambda: {KILL}); print('done'); return 0", (0, "")),
        (f"atexit.register(lambda: {KILL}); raise KeyboardInterrupt", (130, "saltern: interrupted\n")),
    ],
    ids=["while it works", "after its end", "a second one"],
)
def test_a_signal_ends_the_command_with_its_code(name: str, body: str, ended: tuple[int, str]) -> None:
    program = PROGRAM.format(body=body.format(name))
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert (found.returncode, found.stderr) == ended
    assert found.stdout == ("done\n" if ended[0] == 0 else "")
