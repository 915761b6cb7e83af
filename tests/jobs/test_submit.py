"""saltern submit against a real Ray head on loopback, with a token."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import until
from making import OWN_NET, write_shard
from ray_head import Head, started_head, submit, user_env

from saltern import __version__

pytestmark = pytest.mark.slow

# Asks for a client under each of some settings, given as JSON. Ray keeps what it has read of them until a reset.
TOKENS = """
import json, os, sys
from ray._private.authentication_test_utils import reset_auth_token_state
from saltern.pipeline.submit.submission import job_client
address, *settings = sys.argv[1:]
usual = dict(os.environ)
for changed in map(json.loads, settings):
    os.environ.clear()
    os.environ.update(usual | changed)
    reset_auth_token_state()
    try:
        job_client(address)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as head:
        yield head


def test_a_failing_job_reads_its_config_and_passes_its_exit_code_on(head: Head, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('model = "resnet18"\nmethod = "grad-cam"\n')
    words = ("extract", "no-such/*.tar", "--out", "run", "--config", "c.toml")
    ended = submit("--address", head.address, "--follow", "--", *words, cwd=tmp_path, env=head.env)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stdout, ended.stderr
    assert f"{tmp_path}/no-such/*.tar" in ended.stdout.splitlines()[-1]
    assert f"paths that the cluster must see: {tmp_path}/no-such/*.tar, {tmp_path}/run" in ended.stderr
    name = ended.stderr.split("started ")[1].split()[0]
    job = head.ask(name)
    assert job["driver_exit_code"] == 2
    assert {key: value for key, value in job["metadata"].items() if key.startswith("saltern.")} == {
        "saltern.command": "extract",
        "saltern.fingerprint": job["metadata"]["saltern.fingerprint"],
        "saltern.out": f"{tmp_path}/run",
        "saltern.version": __version__,
    }
    assert name == f"saltern-extract-{job['metadata']['saltern.fingerprint'][:8]}"


def test_the_same_job_again(head: Head, tmp_path: Path) -> None:
    """A running job is named and followed, not started again. A stopped one is started under a new id."""
    words = ("status", "/no-such/*")
    head.hold.touch()
    try:
        first = head.submit("--", *words, cwd=tmp_path, RAY_ADDRESS="http://127.0.0.1:9")  # --address wins
        name = first.stdout.strip()
        assert first.returncode == 0
        assert name.startswith("saltern-status-")
        follow = f"saltern submit --address {head.address} --follow -- status '/no-such/*'"
        assert first.stderr == f"follow it with: {follow}\n"
        again = head.submit("--", *words, cwd=tmp_path)
        assert (again.returncode, again.stdout.strip()) == (0, name)
        assert "already running" in again.stderr
        interrupted = _interrupted(head, name, words, tmp_path)
        assert interrupted.returncode == 130
        assert "keeps running" in interrupted.stderr
        assert "Traceback" not in interrupted.stderr
        assert head.ask(name)["status"] in ("PENDING", "RUNNING")
        head.ask(f"{name}/stop", "POST")
        head.wait_for(name, "STOPPED")
    finally:
        head.hold.unlink()
    assert _follow(head, name, tmp_path) == (130, "was stopped")
    after = head.submit("--follow", "--", *words, cwd=tmp_path)
    assert after.returncode == 2
    assert f"started {name}-2" in after.stderr
    assert head.ask(f"{name}-2")["status"] == "FAILED"


def _interrupted(head: Head, name: str, words: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Follow a held job, and press Ctrl-C after its first line."""
    head.wait_for(name, "RUNNING")
    process = head.start("--follow", "--", *words, cwd=cwd)
    until(lambda: "\n" in head.forks.said())
    os.kill(process, signal.SIGINT)
    return head.forks.end()


def _follow(head: Head, name: str, cwd: Path) -> tuple[int, str]:
    """Follow a job that has ended."""
    script = (
        "import sys; from saltern.pipeline.submit.submission import job_client, follow; "
        "code, end = follow(job_client(sys.argv[1]), sys.argv[2], lambda text: None); print(code, end)"
    )
    head.forks.start("python", head.address, name, cwd=cwd, env=head.env, code=script)
    ended = head.forks.end()
    assert ended.returncode == 0, ended.stderr
    code, _, end = ended.stdout.strip().partition(" ")
    return int(code), end


def test_a_wrong_token_is_refused_in_one_line(head: Head, tmp_path: Path) -> None:
    env = user_env(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    head.forks.start("saltern", "submit", "--address", head.address, "--", "methods", cwd=tmp_path, env=env)
    ended = head.forks.end()
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "refuses this token" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert not list(tmp_path.iterdir())


def test_missing_tokens(head: Head, tmp_path: Path) -> None:
    expected = {
        "{}": "asks for a token; set RAY_AUTH_MODE=token",
        '{"RAY_AUTH_MODE": "token"}': "no token was found",
        '{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no/such/token"}': "no token was found",
    }
    head.forks.start("python", head.address, *expected, cwd=tmp_path, env=user_env(tmp_path), code=TOKENS)
    ended = head.forks.end()
    assert ended.returncode == 0, ended.stderr
    for line, words in zip(ended.stdout.splitlines(), expected.values(), strict=True):
        assert line.startswith("UserError ")
        assert words in line
    assert not list(tmp_path.iterdir())


def test_an_extract_with_the_users_model(head: Head, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(OWN_NET)
    write_shard(tmp_path / "shards" / "a-0.tar", 3)
    words = ("shards/a-0.tar", "--out", "run", "--model", "nets:small", "--layer", "1", "--method", "grad-cam")
    ended = head.submit("--follow", "--", "extract", *words, "--crop", "64", "--resize", "64", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr.count("\n") == 2  # the paths, and what was started
    assert "Running entrypoint for job saltern-extract-" in ended.stdout
    assert "engine ray" in ended.stdout  # auto, as RAY_ADDRESS is set in a job
    receipts = list((tmp_path / "run" / "receipts").rglob("*.json"))
    assert [json.loads(path.read_text())["rows"] for path in receipts] == [3]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["versions"]["saltern"] == __version__
