"""saltern submit without a head: wrong commands, wrong addresses, a missing job client."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import call, refused
from ray_head import user_env

from saltern.jobs.main import app
from saltern.jobs.submit import parse
from saltern.pipeline.submit.staging import Word


def parsed(*words: str) -> tuple[str, list[Word]]:
    group = typer.main.get_group(app)
    return parse(group.context_class(group, info_name="saltern"), list(words))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no command to run"),
        (["bench"], "no command to run"),
        (["submit", "--", "methods"], "no command to run"),
        (["extrct"], "No such command 'extrct'"),
        (["extract", "a.tar", "--modle", "x"], "No such option: --modle"),
        (["extract", "a.tar", "--out"], "Option '--out' requires an argument"),
    ],
)
def test_a_wrong_command_is_refused_here(words: list[str], error: str) -> None:
    assert error in refused(call("submit", "--", *words))


def test_the_order_of_options_does_not_matter() -> None:
    first = parsed("extract", "a.tar", "--out", "r", "-O", "x=1", "b.tar", "--no-map", "-O", "y=2")
    assert first == parsed("extract", "--no-map", "-Ox=1", "--out=r", "-Oy=2", "a.tar", "b.tar")
    assert first[0] == "extract"
    assert [word.value for word in first[1] if word.name == "shards"] == ["a.tar", "b.tar"]


def test_a_subcommand_keeps_its_group() -> None:
    assert parsed("bench", "extract", "--out", "b") == ("bench extract", [Word("out", "--out", "b")])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:9", "nothing answers at http://127.0.0.1:9"),
        ("127.0.0.1:6379", "is not the address of a dashboard; give --address http://HOST:8265"),
        ("ray://127.0.0.1:10001", "is not the address of a dashboard"),
    ],
)
def test_addresses_without_a_dashboard(monkeypatch: pytest.MonkeyPatch, address: str, words: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert words in refused(call("submit", "--", "methods"))


@pytest.mark.slow
def test_another_server_is_not_a_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "disable", lambda level: None)  # it would stay
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that what the command sets goes
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        address = f"http://127.0.0.1:{port}"
        ended = call("submit", "--address", address, "--", "methods")
        server.terminate()
    assert "is not a Ray dashboard" in refused(ended)


@pytest.mark.slow
def test_a_missing_job_client_is_named(tmp_path: Path) -> None:
    """Without its extra `default`, Ray can be imported but refuses to make a client."""
    script = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from saltern.pipeline.submit import submission\n"
        "submission._check_reachable = lambda address: None\n"
        "try: submission.job_client('http://127.0.0.1:9')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    env = user_env(tmp_path)
    ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("UserError saltern submit needs Ray's job client")
    assert "pip install -c constraints.txt '.[submit]'" in ended.stdout
