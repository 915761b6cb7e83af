"""The ranks of a training as workers of Ray Train. What they lose by a death is done again, to the same bits.

Checkpoints are the training's own, in its folder: Ray's are asynchronous, and a kill may resume from the one before.
"""

import os
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from saltern.pipeline import machine
from saltern.pipeline.casm.training.loop import locked, run, stands
from saltern.pipeline.casm.training.plan import TrainingPlan, TrainRequest, make_plan
from saltern.pipeline.casm.training.ranks import Ranks
from saltern.pipeline.masknet.checkpoint import Checkpoint, Checkpoints
from saltern.schemas.errors import UserError

ATTEMPTS = 3  # deaths that a training may see from one checkpoint to the next
_POLL_S = 0.5
_STUCK_S = 1800  # a rank that waits longer for the others fails


class _Note(NamedTuple):
    """What a rank tells the driver."""

    kind: str  # said | user (a UserError) | code (any other that is no fault of the machines)
    text: str


def train_on_ray(
    request: TrainRequest, standing: Checkpoint | None, found: dict[str, float], say: Callable[[str], None]
) -> Path:
    """As `saltern.pipeline.casm.training.train.train`, by `request.workers` ranks on the cluster that was joined.

    Args:
        found: the cluster's resources.

    Raises:
        RuntimeError: an error in the code of a rank, with its traceback.
    """
    device = request.device if request.device != "auto" else "cuda" if found.get("GPU") else "cpu"
    gpus = _gpus(request, device, found)
    plan = make_plan(request, device, standing, say)
    with locked(plan.root, "driver"):
        store = plan.root / "ray"
        try:
            return _go(plan, request.workers, gpus, found, store, say)
        finally:
            ray.shutdown()  # so that another training of this process finds it as this one did
            shutil.rmtree(store, ignore_errors=True)  # Ray Train asks for a folder, and leaves a marker there


def _gpus(request: TrainRequest, device: str, found: dict[str, float]) -> float:
    gpus = float(device == "cuda") if request.gpus_per_worker is None else request.gpus_per_worker
    if device == "cpu" and gpus:
        raise UserError(f"--gpus-per-worker {gpus:g} with --device cpu: leave one of them out")
    if device == "cuda" and not gpus:
        raise UserError("--gpus-per-worker 0 with --device cuda: give each worker a share of a GPU")
    for name, each in (("GPU", gpus), ("CPU", 1.0)):
        if request.workers * each > found.get(name, 0.0):
            raise UserError(
                f"--workers {request.workers} need {request.workers * each:g} {name}s, and the cluster has "
                f"{found.get(name, 0.0):g}; give fewer workers"
            )
    return gpus


def _go(
    plan: TrainingPlan, workers: int, gpus: float, found: dict[str, float], store: Path, say: Callable[[str], None]
) -> Path:
    cpus = max(1.0, found["CPU"] // workers) if not gpus else 1.0
    died, before = 0, -1
    while True:
        queue = Queue(actor_options={"num_cpus": 0})
        trainer = _Trainer(
            _rank,
            train_loop_config={"plan": ray.put(plan), "queue": queue},
            # Two ranks of one GPU cannot join one NCCL group.
            torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo", timeout_s=_STUCK_S),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpus > 0, resources_per_worker=_resources(min(cpus, 16), gpus)
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as that of Train's first version
                storage_path=str(store), name="casm", worker_runtime_env={"env_vars": _environment(plan)}
            ),
        )
        reason = _fit(trainer, queue, plan.root, say)
        newest = Checkpoints(plan.root).newest()
        step = newest.step if newest is not None else 0
        if not reason:
            return plan.root / "checkpoints" / str(step)
        died = died + 1 if step == before else 1
        before = step
        if died == ATTEMPTS:
            raise UserError(f"workers died {died} times after step {step:,}: {reason}")
        say(f"a worker died ({reason}); all of them begin again at step {step:,}")


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to us: Ray would answer it with an abort, and exit 0."""


def _fit(trainer: TorchTrainer, queue: Queue, root: Path, say: Callable[[str], None]) -> str:
    """Train to the end, or to a death, whose reason is returned. What ranks tell is taken in beside."""
    notes: dict[str, str] = {}
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            _listen(queue, notes, say)
        _listen(queue, notes, say)

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
        say(f"interrupted; {stands(newest.folder if newest else root / 'none')}")
        raise
    finally:
        over.set()
        listener.join()
    if "user" in notes:
        raise UserError(notes["user"])
    if "code" in notes:
        raise RuntimeError(notes["code"])
    queue.shutdown(force=True)
    return reason


def _listen(queue: Queue, notes: dict[str, str], say: Callable[[str], None]) -> None:
    """Take in what the ranks told, for a moment at least."""
    wait_s = _POLL_S
    while True:
        try:
            note = queue.get(timeout=wait_s)
        except Empty:
            return
        wait_s = 0.01
        if note.kind == "said":
            say(note.text)
        else:
            notes.setdefault(note.kind, note.text)


def _reason(error: BaseException) -> str:
    """The death itself, not that which the others saw of it."""
    by_rank = getattr(error, "worker_failures", None) or {0: error}
    first = {rank: str(why).strip().splitlines()[0] if str(why).strip() else repr(why) for rank, why in by_rank.items()}
    dead = {rank: text for rank, text in first.items() if "health check" in text} or first
    return "; ".join(f"rank {rank}: {text[:200]}" for rank, text in dead.items())


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def _environment(plan: TrainingPlan) -> dict[str, str]:
    return {
        **machine.ENVIRONMENT,
        "OMP_NUM_THREADS": str(plan.config["torch_threads"]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


def _rank(config: dict[str, Any]) -> None:
    """What a worker does."""
    context, queue = ray.train.get_context(), config["queue"]
    try:
        plan: TrainingPlan = ray.get(config["plan"])
        ranks = Ranks(
            ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size(),
            context.get_local_world_size(),
        )  # fmt: skip
        run(plan, ranks, lambda text: queue.put(_Note("said", text)))
    except UserError as error:
        queue.put(_Note("user", str(error)))
        raise
    except (RuntimeError, OSError):  # lost ranks, devices and files: worth another attempt
        raise
    except Exception:
        queue.put(_Note("code", traceback.format_exc()))
        raise
