"""Train with the ranks as workers of Ray Train. If a rank dies, its lost steps are repeated with the same result.

The training writes its own checkpoints, in its own folder. Ray's checkpoints are asynchronous: after a kill, it may
resume from the one before the last.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from saltern.pipeline import machine, naming
from saltern.pipeline.masknet.checkpoint import Checkpoint, Checkpoints
from saltern.pipeline.storage.store import SCRATCH
from saltern.pipeline.training.loop import describe_checkpoint, locked
from saltern.pipeline.training.ray_rank import train_rank
from saltern.pipeline.training.request import MakePlan, R, Request
from saltern.pipeline.training.trainee import Plan
from saltern.schemas.errors import CollapseError, UserError

ATTEMPTS = 3  # deaths from one checkpoint to the next that end a training
_POLL_S = 0.5
_STUCK_S = 1800  # a rank that waits longer for the others fails


def train_on_ray(
    request: R,
    make_plan: MakePlan[R],
    existing: Checkpoint | None,
    resources: dict[str, float],
    say: Callable[[str], None],
) -> Path:
    """Train as `training.train.train` does, with `request.workers` ranks on the cluster that this process joined.

    Args:
        request, make_plan: as of `train`.
        existing: the checkpoint to resume from.
        resources: of the cluster, by name.
        say: takes a line for the user.

    Raises:
        UserError: as `train`; or the cluster is too small, or workers died too often.
        RuntimeError: an error in the code of a rank, with its traceback.
    """
    device = request.device if request.device != "auto" else "cuda" if resources.get("GPU") else "cpu"
    gpus = _gpus_per_rank(request, device, resources)
    plan = make_plan(request, device, existing, say)
    with locked(plan.root, "driver"):
        storage = plan.root / f"{SCRATCH}ray"
        try:
            # Two ranks that share a GPU cannot join one NCCL group.
            backend = TorchConfig(backend="nccl" if gpus >= 1 else "gloo", timeout_s=_STUCK_S)
            return _train_until_done(plan, _scaling(request.workers, gpus, resources), backend, storage, say)
        finally:
            ray.shutdown()  # so that the next training of this process can join a cluster
            shutil.rmtree(storage, ignore_errors=True)  # Ray Train needs a folder, and leaves a marker in it


def _gpus_per_rank(request: Request, device: str, resources: dict[str, float]) -> float:
    gpus = float(device == "cuda") if request.gpus_per_worker is None else request.gpus_per_worker
    if device == "cpu" and gpus:
        raise UserError(f"--gpus-per-worker {gpus:g} with --device cpu: leave one of them out")
    if device == "cuda" and not gpus:
        raise UserError("--gpus-per-worker 0 with --device cuda: give each worker a share of a GPU")
    for name, each in (("GPU", gpus), ("CPU", 1.0)):
        if request.workers * each > resources.get(name, 0.0):
            raise UserError(
                f"--workers {request.workers} need {request.workers * each:g} {name}s, and the cluster has "
                f"{resources.get(name, 0.0):g}; give fewer workers"
            )
    return gpus


def _scaling(workers: int, gpus: float, resources: dict[str, float]) -> ScalingConfig:
    cpus = 1.0 if gpus else min(max(1.0, resources["CPU"] // workers), 16)
    each = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=each)


def _train_until_done(
    plan: Plan, scaling: ScalingConfig, backend: TorchConfig, storage: Path, say: Callable[[str], None]
) -> Path:
    """Start all ranks again after each death; give up after ATTEMPTS deaths without a new checkpoint."""
    deaths, step_before = 0, -1
    while True:
        queue = Queue(actor_options={"num_cpus": 0})
        trainer = _Trainer(
            train_rank,
            train_loop_config={"plan": ray.put(plan), "queue": queue},
            torch_config=backend,
            scaling_config=scaling,
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as that of Train's first version
                storage_path=str(storage), name="training", worker_runtime_env={"env_vars": _environment(plan)}
            ),
        )
        reason = _fit(trainer, queue, plan.root, say)
        newest = Checkpoints(plan.root).newest()
        step = newest.step if newest is not None else 0
        if not reason:
            return plan.root / "checkpoints" / str(step)
        deaths = deaths + 1 if step == step_before else 1
        step_before = step
        if deaths == ATTEMPTS:
            raise UserError(f"workers died {deaths} times after step {step:,}: {reason}")
        say(f"a worker died ({reason}); all of them start again at step {step:,}")


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to this job: Ray would answer it with an abort, and exit code 0."""


def _environment(plan: Plan) -> dict[str, str]:
    return {
        **machine.ENVIRONMENT,
        "OMP_NUM_THREADS": str(plan.config["torch_threads"]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        naming.MODULES: os.getcwd(),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


def _fit(trainer: TorchTrainer, queue: Queue, root: Path, say: Callable[[str], None]) -> str:
    """Train to the end, or until a rank dies; return the reason of the death, "" at the end."""
    errors: dict[str, str] = {}
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            _receive(queue, errors, say)
        _receive(queue, errors, say)

    listener = threading.Thread(target=listen, name="saltern-listen")
    listener.start()
    reason = ""
    try:
        trainer.fit()
    except TrainingFailedError as error:
        reason = _reason(error)
    except KeyboardInterrupt:
        over.set()
        listener.join()
        ray.shutdown()  # ends the workers
        newest = Checkpoints(root).newest()
        say(f"interrupted; {describe_checkpoint(newest.folder if newest else root / 'none')}")
        raise
    finally:
        over.set()
        listener.join()
    if "collapse" in errors:
        raise CollapseError(errors["collapse"])
    if "user" in errors:
        raise UserError(errors["user"])
    if "code" in errors:
        raise RuntimeError(errors["code"])
    queue.shutdown(force=True)
    return reason


def _receive(queue: Queue, errors: dict[str, str], say: Callable[[str], None]) -> None:
    """Wait for notes of the ranks; say them, or keep the first error of each kind."""
    wait_s = _POLL_S
    while True:
        try:
            kind, text = queue.get(timeout=wait_s)
        except Empty:
            return
        wait_s = 0.01
        if kind == "said":
            say(text)
        else:
            errors.setdefault(kind, text)


def _reason(error: BaseException) -> str:
    """Return the reason why a rank died, without the errors that this caused in the other ranks."""
    by_rank = getattr(error, "worker_failures", None) or {0: error}
    first = {rank: str(why).strip().splitlines()[0] if str(why).strip() else repr(why) for rank, why in by_rank.items()}
    dead = {rank: text for rank, text in first.items() if "health check" in text} or first
    return "; ".join(f"rank {rank}: {text[:200]}" for rank, text in dead.items())
