"""Select the engine and the number of workers, and make the pool."""

import os
import secrets
from dataclasses import dataclass

import torch

from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.pool import Factory, Pool
from saltern.pipeline.machine import check_device, pick_device
from saltern.schemas import choices
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Engine:
    """The selected engine."""

    ray: bool
    device: str  # cpu | cuda
    workers: int
    gpus: float  # of each worker
    why: str  # for the user

    def __str__(self) -> str:
        kind = "ray" if self.ray else "local"
        return f"engine {kind} ({self.why}): {self.workers} worker{'s' * (self.workers > 1)} on {self.device}"


def select_engine(
    engine: str, device: str, address: str | None, workers: int | None, gpus_per_worker: float | None
) -> Engine:
    """Select the local engine for one device without a cluster, else Ray. For Ray, join or start a cluster.

    Raises:
        UserError: the options contradict each other, or are not possible on this machine.
    """
    choices.check_choice("--engine", engine, choices.Engine)
    check_device(device)
    if engine == "local" and (address or (workers or 1) > 1):
        raise UserError("--engine local is one worker in this process; --address and --workers need --engine ray")
    why = "as requested" if engine != "auto" else _reason_for_ray(device, address, workers)
    if engine == "local" or why is None:
        if gpus_per_worker is not None:
            raise UserError("--gpus-per-worker has no effect in the local engine; give --engine ray, or leave it out")
        return Engine(False, pick_device(device), 1, 0.0, why or "one device and no cluster")
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_gpus(pick_device(device), workers, gpus_per_worker)
    secure(address)
    from saltern.pipeline.engine.actors import join_cluster

    resources = join_cluster(address)
    if device == "auto":
        device = "cuda" if resources.get("GPU") else "cpu"
    if device == "cpu" and gpus_per_worker:
        raise UserError(f"--gpus-per-worker {gpus_per_worker:g} has no effect on cpu; leave it out")
    gpus = float(device == "cuda") if gpus_per_worker is None else gpus_per_worker
    return Engine(True, device, workers or max(1, int(resources.get("GPU", 0.0) / gpus) if gpus else 1), gpus, why)


def _check_gpus(device: str, workers: int | None, gpus_per_worker: float | None) -> None:
    """Raise UserError if a cluster on this machine can never have the GPUs. Ray would wait for them without end."""
    each, here = float(device == "cuda") if gpus_per_worker is None else gpus_per_worker, torch.cuda.device_count()
    if each * (workers or 1) > here:
        wanted = f"{workers or 1} workers with {each:g} GPUs each need {each * (workers or 1):g}"
        raise UserError(
            f"{wanted}, and this machine has {here}: "
            "give --workers and --gpus-per-worker (which may be a fraction) that fit, or the --address of a cluster"
        )


def _reason_for_ray(device: str, address: str | None, workers: int | None) -> str | None:
    if address or os.environ.get("RAY_ADDRESS"):
        return "a cluster was named"
    if (workers or 1) > 1:
        return f"{workers} workers were requested"
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    return f"{gpus} GPUs here" if gpus > 1 and workers is None else None


def secure(address: str | None) -> None:
    """Close a cluster that this process will start to everyone else. Ray reads the variables when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on every system: listen on loopback only
        os.environ.setdefault("RAY_enable_metrics_collection", "0")  # metrics need no token
        # A process for each core, which no actor would use: actors have environments of their own.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def make_pool(engine: Engine, factory: Factory, decode_threads: int | None, torch_threads: int) -> Pool:
    """Return a pool whose workers build their processors with `factory`.

    Args:
        decode_threads: of each worker, as requested.
        torch_threads: of each worker.
    """
    if not engine.ray:
        return LocalPool(factory)
    from saltern.pipeline.engine.actors import RayPool

    cpus = decode_threads if engine.gpus else torch_threads
    return RayPool(factory, gpus=engine.gpus, cpus=cpus, torch_threads=torch_threads, workers=engine.workers)
