"""The training of CASM: checked here, then done in this process, or by data-parallel workers on Ray."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from saltern.pipeline.casm.training.loop import locked, run
from saltern.pipeline.casm.training.plan import TrainRequest, make_plan
from saltern.pipeline.casm.training.ranks import Ranks
from saltern.pipeline.engine.selection import secure
from saltern.pipeline.machine import pick_device, sigterm_as_interrupt
from saltern.pipeline.masknet.checkpoint import Checkpoint, Checkpoints
from saltern.schemas.errors import UserError

__all__ = ["TrainRequest", "say_aside", "train"]


def say_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train(request: TrainRequest, say: Callable[[str], None] = say_aside) -> Path:
    """Train, or go on with a training, and return its last checkpoint.

    The same request, stopped anywhere and resumed, ends with the same weights, pool files and log to the bit: on the
    same kind of device, with as many workers and torch threads in each (the threads are kept in the checkpoint).

    Raises:
        UserError: anything that was asked for cannot be had, before any work; or a loss that is not finite.
        KeyboardInterrupt: once it is said what stands.
    """
    with sigterm_as_interrupt():
        address = request.address or os.environ.get("RAY_ADDRESS")
        standing = _standing(Checkpoints(Path(request.out)), request, say)
        if request.workers > 1 or address:
            return _on_ray(request, standing, address, say)
        device = pick_device(request.device)
        plan = make_plan(request, device, standing, say)
        with locked(plan.root, "driver"):
            return run(plan, Ranks(torch.device(device)), say)


def _on_ray(
    request: TrainRequest, standing: Checkpoint | None, address: str | None, say: Callable[[str], None]
) -> Path:
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # or Ray Train's workers would not find relative paths
    secure(address)
    from saltern.pipeline.casm.training.train_ray import train_on_ray
    from saltern.pipeline.engine.actors import join_cluster

    return train_on_ray(request, standing, join_cluster(address), say)


def _standing(checkpoints: Checkpoints, request: TrainRequest, say: Callable[[str], None]) -> Checkpoint | None:
    found = checkpoints.newest(say)
    if found is not None and not request.resume:
        raise UserError(
            f"{request.out} holds a training, at step {found.step}: --resume goes on, or give another --out"
        )
    if found is None and request.resume:
        say(f"{request.out} holds no checkpoint yet; begins at step 0")
    return found
