"""A Ray head with a dashboard on loopback, and users who submit jobs to it."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from making import PYTHONPATH

from saltern.pipeline.machine import cores

START_S = 90
CLI = [sys.executable, "-m", "saltern", "submit"]

# Ray's command, without a server of Ray Client, and with a dashboard of only jobs and nodes. Each part is a process.
RAY = """
from ray._private import node, services
from ray.scripts.scripts import main
start = services.start_ray_process
def start_less(command, kind, *given, **more):
    return start([*command, *(["--modules-to-load=JobHead,NodeHead"] * (kind == "dashboard"))], kind, *given, **more)
services.start_ray_process = start_less
node.Node.start_ray_client_server = lambda self: None
main()
"""

# Reads one call in JSON from each line, runs it in a fork of this process, and prints the fork's number and exit code.
FORKS = """
import json, os, signal, sys
import aiohttp, ray.dashboard.modules.job.sdk, ray.job_submission
import saltern.jobs.main, saltern.pipeline.submit.staging, saltern.pipeline.submit.submission
for line in sys.stdin:
    call = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in enumerate([os.devnull, *call["streams"]]):
            os.dup2(os.open(path, os.O_RDWR), number)
        signal.alarm(120)
        os.chdir(call["cwd"])
        os.environ.clear()
        os.environ.update(call["env"])
        sys.argv = call["words"]
        exec(call["code"])
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
COMMAND = "saltern.jobs.main.main()"


class Forks:
    """A process that has imported Ray's client, which takes seconds, and runs commands of users in its forks."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self._streams = [folder / "out", folder / "err"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-c", FORKS], env=env, text=True, **pipes)

    def start(self, *words: str, cwd: Path, env: dict[str, str], code: str = COMMAND) -> int:
        """Run code with the words of a command line. Returns the number of the process."""
        call = {"streams": list(map(str, self._streams)), "cwd": str(cwd), "env": env, "words": words, "code": code}
        for path in self._streams:
            path.write_bytes(b"")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def said(self) -> str:
        """Return the output so far of what was started last."""
        return self._streams[0].read_text()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end of what was started last."""
        code = self._answer()
        return subprocess.CompletedProcess([], code, *(path.read_text() for path in self._streams))

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Head:
    """A running head. Its `python` waits as long as the file `hold` exists."""

    address: str
    token: str
    hold: Path
    env: dict[str, str]  # of a user who has the token
    forks: Forks

    def ask(self, path: str, method: str = "GET") -> Any:
        """Return the answer of the dashboard's Jobs API."""
        request = urllib.request.Request(f"{self.address}/api/jobs/{path}", method=method)  # noqa: S310
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.load(answer)

    def submit(self, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `saltern submit` in a fork, as a user who has the token."""
        self.start(*words, cwd=cwd, **env)
        return self.forks.end()

    def start(self, *words: str, cwd: Path, **env: str) -> int:
        """Start what `submit` runs. Returns the number of the process."""
        return self.forks.start("saltern", "submit", "--address", self.address, *words, cwd=cwd, env=self.env | env)

    def wait_for(self, name: str, *statuses: str) -> dict[str, Any]:
        """Return the job when it has one of the statuses."""
        for _ in range(600):
            job: dict[str, Any] = self.ask(name)
            if job["status"] in statuses:
                return job
            time.sleep(0.1)
        pytest.fail(f"{name} is {job['status']}: {job['message']}")


def submit(*words: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `saltern submit` in a process."""
    return subprocess.run([*CLI, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def user_env(home: Path, **more: str) -> dict[str, str]:
    """Return this process's environment without its Ray settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "PYTHONPATH": PYTHONPATH,
        "HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        **more,
    }


@contextlib.contextmanager
def started_head() -> Iterator[Head]:
    """Run a head with a dashboard and a token."""
    # Unix sockets allow paths of 107 bytes: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="slt-", dir="/tmp"))
    for name in ("home", "bin"):
        (folder / name).mkdir()
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    hold, python = folder / "hold", folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nwhile [ -e {hold} ]; do sleep 0.1; done\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = user_env(folder / "home", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    # Jobs must import the code that travels with them, not this checkout.
    own = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": "",
        "RAY_prestart_worker_first_driver": "0",
    }
    address = f"http://127.0.0.1:{_free_port()}"
    command = _start(folder, address.rpartition(":")[2])
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env | own, stdout=log, stderr=log, start_new_session=True)
    try:
        forks = Forks(folder, env)
        try:
            _await(process, address, folder / "head.log")
            yield Head(address, token, hold, env, forks)
        finally:
            forks.close()
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, dashboard_port: str) -> list[str]:
    return [
        *(sys.executable, "-c", RAY, "start", "--head", "--block", "--port", "0", "--node-ip-address", "127.0.0.1"),
        *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard_port),
        *("--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(_free_port())),
        *("--no-monitor", "--include-log-monitor", "false"),
        # An actor requests as many CPUs as its torch has threads, which is the number of cores here.
        *("--num-cpus", str(cores()), "--num-gpus", "0", "--object-store-memory", "80000000"),
        *("--temp-dir", str(folder / "r"), "--disable-usage-stats"),
    ]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _await(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    host, port = address.removeprefix("http://").split(":")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the head did not start:\n{log.read_text()[-3000:]}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and the processes that it started; `ray stop` would end every Ray process of the user."""
    family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=10)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=10)
    psutil.wait_procs(family, timeout=10)
