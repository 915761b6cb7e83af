"""Train: check the request, then train in this process, or with data-parallel workers on Ray."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from saltern.pipeline.engine.selection import secure
from saltern.pipeline.machine import pick_device, sigterm_as_interrupt
from saltern.pipeline.masknet.checkpoint import Checkpoint, Checkpoints
from saltern.pipeline.training.loop import locked, run
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.request import MakePlan, R
from saltern.schemas.errors import DeviceLostError, UserError, printable


def print_to_stderr(text: str) -> None:
    """Print a line for the user."""
    print(printable(text), file=sys.stderr, flush=True)


def train(request: R, make_plan: MakePlan[R], say: Callable[[str], None] = print_to_stderr) -> Path:
    """Train, or resume a training, and return its last checkpoint.

    The same request, stopped at any moment and resumed, ends with the same weights, pool files and log, bit for bit:
    on the same kind of device, with as many workers and as many torch threads in each. A checkpoint keeps the threads.

    Args:
        request: what to train.
        make_plan: checks the request; takes the device, the checkpoint to resume from, and a function for lines.
        say: takes a line for the user.

    Raises:
        UserError: the request cannot be met, found before any work; or a loss is not finite.
        KeyboardInterrupt: the message names the complete checkpoint.
    """
    with sigterm_as_interrupt():
        address = request.address or os.environ.get("RAY_ADDRESS")
        existing = _existing(Checkpoints(Path(request.out)), request, say)
        if request.workers > 1 or address:
            return _train_on_ray(request, make_plan, existing, address, say)
        if request.gpus_per_worker is not None:
            raise UserError("--gpus-per-worker has no effect on one worker in this process; leave it out")
        device = pick_device(request.device)
        plan = make_plan(request, device, existing, say)
        with locked(plan.root, "driver"):
            try:
                return run(plan, Ranks(torch.device(device)), say)
            except DeviceLostError as error:
                raise UserError(str(error)) from error


def _existing(checkpoints: Checkpoints, request: R, say: Callable[[str], None]) -> Checkpoint | None:
    newest = checkpoints.newest(say)
    if newest is not None and not request.resume:
        raise UserError(
            f"{request.out} holds a training, at step {newest.step}: --resume continues it, or give another --out"
        )
    if newest is None and request.resume:
        say(f"{request.out} holds no checkpoint yet; training starts at step 0")
    return newest


def _train_on_ray(
    request: R, make_plan: MakePlan[R], existing: Checkpoint | None, address: str | None, say: Callable[[str], None]
) -> Path:
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # otherwise Ray Train's workers do not find relative paths
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one more process; ranks do not need warnings
    secure(address)
    from saltern.pipeline.engine.actors import join_cluster
    from saltern.pipeline.training.train_ray import train_on_ray

    return train_on_ray(request, make_plan, existing, join_cluster(address), say)
