"""An engine that can never work is refused at once, and a cluster that Saltern starts is closed to others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import PYTHONPATH

from saltern.pipeline.engine import selection
from saltern.schemas.errors import UserError


@pytest.mark.parametrize(
    ("here", "device", "workers", "each"),
    [(0, "auto", None, 1.0), (1, "cuda", 4, None), (2, "auto", 3, 1.0), (1, "auto", 3, 0.5), (0, "auto", 2, 0.5)],
)
def test_gpus_that_can_never_come_are_refused_before_ray_starts(
    here: int, device: str, workers: int | None, each: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here > 0)
    monkeypatch.setattr(selection, "secure", lambda address: pytest.fail("Ray is being started"))
    with pytest.raises(UserError, match=f"this machine has {here}: give --workers"):
        selection.select_engine("ray", device, None, workers, each)


def test_cuda_without_a_device_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is visible"):
        selection.select_engine("ray", "cuda", None, None, None)


PROBE = """
import json, os, psutil
from saltern.pipeline.engine.selection import select_engine
select_engine("ray", "cpu", None, 1, None)
import ray
own = [process.pid for process in psutil.Process().children(recursive=True)] + [os.getpid()]
ports = [port for port in psutil.net_connections("tcp") if port.status == "LISTEN" and port.pid in own]
folder = ray._private.worker._global_node.get_session_dir_path()
above = [os.path.dirname(os.path.dirname(folder))]
words = [word for pid in own for word in psutil.Process(pid).cmdline()]
idle = sum(word.endswith("/default_worker.py") or word.startswith("ray::IDLE") for word in words)
print(json.dumps([sorted({port.laddr.ip for port in ports}), above[0], oct(os.stat(above[0]).st_mode)[-3:], idle]))
"""


@pytest.mark.slow
def test_a_cluster_that_saltern_starts_listens_on_loopback_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    line = [sys.executable, "-c", PROBE]
    ended = subprocess.run(
        line, env={**environment, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    ips, folder, mode, idle = json.loads(ended.stdout.splitlines()[-1])
    assert ips
    assert set(ips) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert mode == "700"
    assert idle == 0
    assert not Path(folder).exists()
