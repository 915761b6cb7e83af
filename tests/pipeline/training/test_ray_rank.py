"""What a rank of Ray Train tells the driver: only errors that another attempt cannot fix end the training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import casm_toys
import faulty
import pytest
import ray
import ray.train.torch
import torch
from making import HELPERS

from saltern.pipeline import machine
from saltern.pipeline.casm.training.plan import make_plan
from saltern.pipeline.device import faults
from saltern.pipeline.training import loop
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.ray_rank import train_rank
from saltern.schemas.errors import CollapseError, DeviceLostError, UserError


def notes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the notes of a rank whose training raises an error, which it raises again."""
    found: list[tuple[str, str]] = []

    def fail(*given: Any) -> None:
        with faults():
            raise error

    counts = dict.fromkeys(("get_local_world_size", "get_world_size"), lambda: 2)
    context = SimpleNamespace(get_world_rank=lambda: 1, **counts)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray, "get", lambda reference: None)
    for name in ("share", "keep_memory"):  # they would change this process
        monkeypatch.setattr(machine, name, lambda *given: None)
    monkeypatch.setattr(loop, "run", fail)
    with pytest.raises((RuntimeError, DeviceLostError, UserError, KeyError)) as raised:
        train_rank({"plan": None, "queue": SimpleNamespace(put=found.append)})
    assert str(raised.value).splitlines()[0] == str(error).splitlines()[0]
    return found


@pytest.mark.parametrize("name", ["accelerator", "nccl", "driver"])
def test_a_lost_device_is_worth_another_attempt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes(faulty.LOST[name], monkeypatch) == []


def test_a_lost_rank_is_worth_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes(RuntimeError("Connection closed by peer [127.0.0.1]:4242"), monkeypatch) == []


@pytest.mark.slow
def test_the_loop_leaves_a_lost_device_to_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = casm_toys.request(casm_toys.write_shards(tmp_path / "in"), tmp_path / "out")
    monkeypatch.chdir(HELPERS)
    plan = make_plan(request, "cpu", None, casm_toys.quiet)
    casm_toys.interrupt(monkeypatch, 5, lambda: faulty.LOST["nccl"])
    with pytest.raises(DeviceLostError, match=r"NCCL error.*the checkpoint of step 4 is complete"):
        loop.run(plan, Ranks(torch.device("cpu")), casm_toys.quiet)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(CollapseError("masks collapsed"), "collapse"), (UserError("lower rates"), "user"), (KeyError("a"), "code")],
)
def test_other_errors_end_the_training(error: Exception, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [note[0] for note in notes(error, monkeypatch)] == [kind]
