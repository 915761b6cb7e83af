"""Workers of Ray that are forked from one process, which imports torch and more once.

Each of Ray's own workers imports Ray twice and torch once, which takes longer than most tests.

As a program: with the path of a socket, the process that forks; with other words, the process that a raylet starts
instead of Ray's setup_worker.py, which has the worker forked and lives until it ends.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SOCKET = "SALTERN_TEST_FORKS"  # the variable with the path of the socket


@contextlib.contextmanager
def forked_workers(folder: Path) -> Iterator[None]:
    """Let raylets that are started inside of the `with` fork their workers. `folder` gets the socket."""
    from making import PYTHONPATH
    from ray._private import ray_constants

    path = folder / "forks"
    line = [sys.executable, __file__, str(path)]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    variable = mock.patch.dict(os.environ, {SOCKET: str(path)})
    try:
        with variable, mock.patch.object(ray_constants, "SETUP_WORKER_FILENAME", __file__):
            yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Start heads without Ray's autoscaler, dashboard and reader of logs, which take seconds and serve no test."""
    from ray._private.node import Node

    def start_api_server(node: Node, **more: object) -> None:
        node._webui_url = ""

    nothing = {"start_monitor": lambda node: None, "start_log_monitor": lambda node: None}
    with mock.patch.multiple(Node, start_api_server=start_api_server, **nothing):
        yield


def preload(*modules: str) -> None:
    """Let the process that forks workers import these too."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        connection.sendall(json.dumps({"modules": modules}).encode())


def _serve(path: str) -> None:
    """Fork a worker for each connection that asks for one, until the input ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()  # a connection waits for the imports
        _import()
        gc.freeze()  # a collection in a fork would write to, and so copy, the memory of all objects
        own = os.environ["PYTHONPATH"].split(os.pathsep)
        usual = [folder for folder in sys.path[1:] if folder not in own]
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            raw, files, _, _ = socket.recv_fds(connection, 2**20, 2)
            while part := connection.recv(2**20):
                raw += part
            ask = json.loads(raw)
            for module in ask.get("modules", ()):
                importlib.import_module(module)
            if "words" in ask and os.fork() == 0:  # the connection is closed by the worker's end
                listener.close()
                _become(ask, files, usual)
            connection.close()
            for file in files:
                os.close(file)


def _import() -> None:
    """Import what actors need, but for Ray, which reads the worker's environment when it is imported."""
    import google.protobuf.json_format  # noqa: F401
    import jsonschema  # noqa: F401
    import pandas  # noqa: F401
    import psutil  # noqa: F401
    import pyarrow.compute
    import pyarrow.pandas_compat  # noqa: F401
    import requests  # noqa: F401
    import torch

    import saltern.pipeline.extract.extraction  # noqa: F401
    from saltern.pipeline.shards.decoder import decode_jpeg

    decode_jpeg()
    torch.set_num_threads(1)
    assert "ray" not in sys.modules


def _become(ask: dict[str, Any], files: list[int], usual: list[str]) -> None:
    """Do what setup_worker.py does, and be the worker."""
    os.setsid()  # a raylet kills the group of a worker that has ended
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(ask["environment"])
    os.chdir(ask["folder"])
    words = [word for word in ask["words"] if not word.startswith("--language=")]
    for word in [word for word in words if word.startswith("--serialized-runtime-env-context=")]:
        words.remove(word)
        os.environ.update(json.loads(word.partition("=")[2]).get("env_vars", {}))
    sys.argv = words
    given = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [str(Path(words[0]).parent), *(given.split(os.pathsep) if given else []), *usual]
    code = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        os._exit(code)


def _ask() -> None:
    """Have a worker forked for this process's words, environment and output. Wait for its end."""
    ask = {"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        socket.send_fds(connection, [b" "], [1, 2])
        connection.sendall(json.dumps(ask).encode())
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            connection.recv(1)


if __name__ == "__main__":
    _serve(sys.argv[1]) if len(sys.argv) == 2 else _ask()
