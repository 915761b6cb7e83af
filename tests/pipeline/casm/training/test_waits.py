"""A training step never waits for the device.

Torch's meta device takes the place of a GPU: its tensors have no data, so each read of one fails. What would copy
between host and device, and so wait, is noted. `tests/gpu_check.py` has the same check on a GPU.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from casm_toys import OFTEN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saltern.pipeline.casm.algorithm import pool, step
from saltern.pipeline.casm.algorithm.collapse import Watch
from saltern.pipeline.casm.algorithm.hyperparameters import PRESETS, Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.training.loop import Normalise, total
from saltern.pipeline.training.ranks import Ranks

META = torch.device("meta")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dicts; torch's own `tree_leaves` takes several times as long."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in values for tensor in tensors_in(part)]


class Copies(TorchDispatchMode):
    """Notes the operations that copy between host and device. Numbers of the host may enter an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = tensors_in((args, kwargs))
        every = [*given, *tensors_in(made)]
        on_device = [value.device == META for value in every if value.device == META or value.dim() > 0]
        new = func is torch.ops.aten.lift_fresh.default and given[0].device == META  # made from numbers of Python
        if new or len(set(on_device)) > 1:
            self.found.append(func.name())
        return made


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.tensor(2.0, device=x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x[torch.tensor([1])],
        lambda x: torch.zeros(3).to(x.device),
    ],
)
def test_every_kind_of_wait_is_noticed(wait: Callable[[Tensor], object]) -> None:
    x, copies = torch.zeros(3, device=META), Copies()
    with copies, contextlib.suppress(NotImplementedError, RuntimeError):
        wait(x)
        assert copies.found


def hyperparameters(**changes: object) -> Hyperparameters:
    return Hyperparameters(**{"thinning": OFTEN, "pool_size": 2, "seed": 1, "steps": 9, **changes})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        hyperparameters(**PRESETS["steady"]),
        hyperparameters(**PRESETS["published"]),
        hyperparameters(thinning=THINNINGS["F"], share_encoder=False),
        hyperparameters(lam="auto", pool_half=True, pull=1.0, clip=0.5),
    ],
    ids=["steady", "published", "F", "16 bits"],
)
def test_no_step_waits(how: Hyperparameters, staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and pool members, which are copied through pinned memory, stay on the device here."""
    net = staged(0.1)
    stages = find_stages(net, 64)
    monkeypatch.setattr(step, "find_stages", lambda *given: stages)
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: contextlib.nullcontext())  # it knows no meta device
    monkeypatch.setattr(pool, "_cloned", lambda value, half: value.half() if half else value.clone())
    training, copies, watch = Training(net.to(META), how, side=64), Copies(), Watch()
    normalise = Normalise({"mean": [0.5] * 3, "std": [0.2] * 3}, META)
    members = set()
    for _ in range(4):
        pixels_BHWC = torch.zeros((4, 64, 64, 3), dtype=torch.uint8, device=META)
        label_B = torch.zeros(4, dtype=torch.long, device=META)
        with copies:
            log = training.step(normalise(pixels_BHWC), label_B)
            watch.add(log.step, log.area())
            assert total(Ranks(META), 1).device == META
        members.add(log.member)
    assert copies.found == []
    assert len(members) > 1 or how.thinning.hp == 0
