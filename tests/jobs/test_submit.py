"""saltern submit against a real Ray head on loopback, with a token."""

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from saltern.jobs.submit import _parse
from saltern.pipeline.submit import submission
from saltern.schemas.errors import UserError

START_S = 90


@dataclass
class Head:
    """A running head; its `python` waits as long as the file `hold` stands."""

    address: str
    token: str
    hold: Path
    env: dict[str, str]  # of a user who may use it

    def ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"{self.address}/api/jobs/{path}", method=method)  # noqa: S310
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.load(answer)

    def submit(self, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        command = [*CLI, "--address", self.address, *words]
        return subprocess.run(
            command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=120, check=False
        )


CLI = [sys.executable, "-m", "saltern", "submit"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def user_env(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without any of its own Ray settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", **more}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Unix sockets allow paths of 107 bytes: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="slt-", dir="/tmp"))
    (folder / "home").mkdir()
    (folder / "bin").mkdir()
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    hold, python = folder / "hold", folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nwhile [ -e {hold} ]; do sleep 0.1; done\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = user_env(folder / "home", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    address = f"http://127.0.0.1:{free_port()}"
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            _start(folder, address.rpartition(":")[2]),
            env={**env, "PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _await_head(process, address, folder / "head.log")
        yield Head(address, token, hold, env)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, dashboard_port: str) -> list[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    return [
        *(ray, "start", "--head", "--block", "--port", "0", "--node-ip-address", "127.0.0.1"),
        *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard_port),
        *("--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(free_port())),
        # An actor asks for as many CPUs as its torch has threads: those of this machine.
        *("--num-cpus", str(len(os.sched_getaffinity(0))), "--num-gpus", "0", "--object-store-memory", "80000000"),
        *("--temp-dir", str(folder / "r"), "--disable-usage-stats"),
    ]


def _await_head(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    host, port = address.removeprefix("http://").split(":")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the head did not start:\n{log.read_text()[-3000:]}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and all it started; `ray stop` would end every Ray process of the user."""
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


def wait_for_status(head: Head, name: str, *wanted: str) -> dict[str, Any]:
    for _ in range(600):
        job: dict[str, Any] = head.ask(name)
        if job["status"] in wanted:
            return job
        time.sleep(0.1)
    pytest.fail(f"{name} is {job['status']}: {job['message']}")


def test_a_job_that_succeeds(head: Head, tmp_path: Path) -> None:
    done = head.submit("--follow", "--", "methods", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert "Running entrypoint for job saltern-methods-" in done.stdout
    assert "grad-cam" in done.stdout


def test_a_job_that_fails_passes_its_exit_code_on(head: Head, tmp_path: Path) -> None:
    words = ("extract", "no-such/*.tar", "--out", "run", "--model", "resnet18", "--method", "grad-cam")
    done = head.submit("--follow", "--", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path}/no-such/*.tar" in done.stdout
    assert f"paths that the cluster must see: {tmp_path}/no-such/*.tar, {tmp_path}/run" in done.stderr
    name = done.stderr.split("started ")[1].split()[0]
    job = head.ask(name)
    assert job["driver_exit_code"] == 2
    assert {key: value for key, value in job["metadata"].items() if key.startswith("saltern.")} == {
        "saltern.command": "extract",
        "saltern.fingerprint": job["metadata"]["saltern.fingerprint"],
        "saltern.out": f"{tmp_path}/run",
        "saltern.version": submission.version("saltern"),
    }
    assert name == f"saltern-extract-{job['metadata']['saltern.fingerprint'][:8]}"


def test_a_config_reaches_the_job(head: Head, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('methud = "grad-cam"\n')
    words = ("extract", "/no-such/*.tar", "--out", "/no-such/run", "--model", "resnet18", "--config", "c.toml")
    done = head.submit("--follow", "--", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "methud" in done.stdout


def test_the_same_job_twice(head: Head, tmp_path: Path) -> None:
    words = ("plan", "/no-such-twice/*.tar")
    head.hold.touch()
    try:
        first = head.submit("--", *words, cwd=tmp_path)
        name = first.stdout.strip()
        assert first.returncode == 0
        follow = f"saltern submit --address {head.address} --follow -- plan '/no-such-twice/*.tar'"
        assert first.stderr == f"follow it with: {follow}\n"
        again = head.submit("--", *words, cwd=tmp_path)
        assert (again.returncode, again.stdout.strip()) == (0, name)
        assert "runs already" in again.stderr
        interrupted = _interrupted(head, name, words, tmp_path)
        assert interrupted.returncode == 130
        assert "goes on without you" in interrupted.stderr
        assert "Traceback" not in interrupted.stderr
        assert head.ask(name)["status"] in ("PENDING", "RUNNING")
    finally:
        head.hold.unlink()
    wait_for_status(head, name, "FAILED")
    after = head.submit("--follow", "--", *words, cwd=tmp_path)
    assert after.returncode == 2
    assert f"started {name}-2" in after.stderr


def _interrupted(head: Head, name: str, words: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Follow a held job, and press Ctrl-C when its first lines are here."""
    wait_for_status(head, name, "RUNNING")
    command = [*CLI, "--address", head.address, "--follow", "--", *words]
    with subprocess.Popen(
        command, cwd=cwd, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_a_job_that_somebody_stops(head: Head, tmp_path: Path) -> None:
    words = ("plan", "/no-such-stopped/*.tar")
    head.hold.touch()
    try:
        name = head.submit("--", *words, cwd=tmp_path).stdout.strip()
        wait_for_status(head, name, "RUNNING")
        head.ask(f"{name}/stop", "POST")
        wait_for_status(head, name, "STOPPED")
    finally:
        head.hold.unlink()
    code, said = _follow(head, name)
    assert (code, said) == (130, "was stopped")


def _follow(head: Head, name: str) -> tuple[int, str]:
    """As the command does, of a job that has ended."""
    script = (
        "import sys; from saltern.pipeline.submit.submission import connect, follow; "
        "code, said = follow(connect(sys.argv[1]), sys.argv[2], lambda text: None); print(code, said)"
    )
    command = [sys.executable, "-c", script, head.address, name]
    out = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=60, check=True).stdout
    code, _, said = out.strip().partition(" ")
    return int(code), said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "asks for a token; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "no token was found"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "refuses this token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no/such/token"}, "no token was found"),
    ],
)
def test_tokens_that_do_not_do(head: Head, tmp_path: Path, settings: dict[str, str], words: str) -> None:
    command = [*CLI, "--address", head.address, "--", "methods"]
    env = user_env(tmp_path, **settings)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_address_given_wins_over_ray_address(head: Head, tmp_path: Path) -> None:
    done = head.submit("--", "methods", cwd=tmp_path, RAY_ADDRESS="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("saltern-methods-")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:9", "nothing answers at http://127.0.0.1:9"),
        ("127.0.0.1:6379", "is no dashboard address; give --address http://HOST:8265"),
        ("ray://127.0.0.1:10001", "is no dashboard address"),
    ],
)
def test_addresses_without_a_dashboard(tmp_path: Path, address: str, words: str) -> None:
    env = user_env(tmp_path, RAY_ADDRESS=address)
    done = subprocess.run(
        [*CLI, "--", "methods"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_another_server_is_told_apart(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        done = subprocess.run(
            [*CLI, "--address", f"http://127.0.0.1:{port}", "--", "methods"],
            env=user_env(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        server.terminate()
    assert done.returncode == 2
    assert "is no Ray dashboard" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("address", "mode", "clear"),
    [
        ("http://10.0.0.5:8265", "token", True),
        ("http://head.example:8265", "token", True),
        ("http://10.0.0.5:8265", "disabled", False),
        ("https://head.example", "token", False),
        ("http://127.0.0.1:8265", "token", False),
        ("http://[::1]:8265", "token", False),
        ("http://localhost:8265", "token", False),
    ],
)
def test_a_token_in_clear_is_seen(monkeypatch: pytest.MonkeyPatch, address: str, mode: str, clear: bool) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert submission.token_in_clear(address) is clear


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "say what to run"),
        (["submit", "--", "methods"], "say what to run"),
        (["extrct"], "say what to run"),
        (["extract", "a.tar", "--modle", "x"], "extract: No such option"),
        (["extract", "a.tar", "--out"], "extract: Option '--out' requires an argument"),
    ],
)
def test_a_wrong_command_is_refused_here(words: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        _parse(words)


def test_the_order_of_options_does_not_matter() -> None:
    first = _parse(["extract", "a.tar", "--out", "r", "-O", "x=1", "b.tar", "--no-map", "-O", "y=2"])
    assert first == _parse(["extract", "--no-map", "-Ox=1", "--out=r", "-Oy=2", "a.tar", "b.tar"])
    assert first[0] == "extract"
    assert [word.value for word in first[1] if word.name == "shards"] == ["a.tar", "b.tar"]


class Flaky:
    """A dashboard whose connections break: each tail gives a little more of the log from its start, then is cut."""

    log = "one\ntwo\nthree\nfour\n"

    def __init__(self) -> None:
        self.tails = 0

    async def tail_job_logs(self, name: str) -> Any:
        self.tails += 1
        for line in self.log.splitlines(keepends=True)[: self.tails]:
            yield line
        raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, name: str) -> Any:
        from ray.job_submission import JobStatus

        status = JobStatus.RUNNING if self.tails < 3 else JobStatus.SUCCEEDED
        return type("Info", (), {"status": status, "driver_exit_code": 0, "message": None})

    def get_job_logs(self, name: str) -> str:
        return self.log


def test_each_line_of_the_log_comes_once() -> None:
    written: list[str] = []
    assert submission.follow(Flaky(), "x", written.append) == (0, "")
    assert "".join(written) == Flaky.log


def test_a_lost_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Flaky):
        def get_job_info(self, name: str) -> Any:
            raise ConnectionError("refused")

    monkeypatch.setattr(submission, "PATIENCE_S", 0)
    with pytest.raises(UserError, match="lost the cluster while following x"):
        submission.follow(Gone(), "x", lambda text: None)


def test_a_closed_stdout_ends_the_following() -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        submission.follow(Flaky(), "x", closed)


@pytest.mark.parametrize(("code", "ours"), [(0, 1), (None, 1), (7, 7), (-9, 137)])
def test_the_exit_code_of_a_failed_job(code: int | None, ours: int) -> None:
    from ray.job_submission import JobStatus

    class Failed(Flaky):
        def get_job_info(self, name: str) -> Any:
            return type("Info", (), {"status": JobStatus.FAILED, "driver_exit_code": code, "message": "no python\nx"})

    got, said = submission.follow(Failed(), "x", lambda text: None)
    assert got == ours
    assert said == ("" if code is not None else "failed before it ran: no python")


@pytest.mark.slow
def test_an_extract_with_a_model_of_ones_own(head: Head, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch, torchvision\n\n\ndef small():\n    torch.manual_seed(0)\n"
        "    return torchvision.models.resnet18(weights=None, num_classes=5).eval()\n"
    )
    _shard(tmp_path / "shards" / "a-0.tar", 3)
    words = ("shards/a-0.tar", "--out", "run", "--model", "nets:small", "--weights", "none", "--method", "grad-cam")
    done = head.submit("--follow", "--", "extract", *words, "--crop", "64", "--resize", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine ray" in done.stdout  # auto, as RAY_ADDRESS is set in a job
    receipts = list((tmp_path / "run" / "receipts").rglob("*.json"))
    assert [json.loads(path.read_text())["rows"] for path in receipts] == [3]


def _shard(path: Path, count: int) -> None:
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(buffer, "JPEG")
            for suffix, raw in (("jpg", buffer.getvalue()), ("cls", str(index).encode())):
                info = tarfile.TarInfo(f"{index:03}.{suffix}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
