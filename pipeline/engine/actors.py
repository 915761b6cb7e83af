"""Workers as Ray actors, one for each GPU. Ray does not restart a dead actor; the driver starts another."""

import atexit
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.job_config import JobConfig

from saltern.pipeline import machine, naming
from saltern.pipeline.engine.pool import Died, Done, Event, Factory, Raised, Ready, ShardProcessor
from saltern.pipeline.runs.outlet import Earlier, Made, MadeTogether
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard

COUNT_EVERY_S = 2.0  # the progress line asks every actor, and each call costs core time on both sides
STORE_BYTES = 80_000_000  # object store of a cluster started here: only receipts cross it


def join_cluster(address: str | None) -> dict[str, float]:
    """Join a cluster, or start one on this machine.

    Returns:
        The cluster's resources by name: CPU, GPU and others.

    Raises:
        UserError: no cluster answers at the address, or the cluster refuses the token.
    """
    local: dict[str, Any] = {}
    if address is None:
        local = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        if not ray.is_initialized():
            local["_temp_dir"] = _private_folder()
    try:
        if not ray.is_initialized():  # an earlier job of this process may have joined
            job = JobConfig()
            job._py_driver_sys_path = _WithoutCurrent()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, job_config=job, **local)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0]
        if address is None:
            raise UserError(f"Ray does not start on this machine: {reason}; --engine local works without it") from error
        raise UserError(
            f"no Ray cluster at {address}: {reason}. Check --address, and RAY_AUTH_MODE=token with the cluster's token"
        ) from error
    return {name: float(value) for name, value in ray.cluster_resources().items()}  # type: ignore[no-untyped-call]


class _WithoutCurrent(list[str]):
    """The folders that Ray puts first in its workers' paths, without the current one.

    Ray adds it whether or not this process has it, and a file there that is named like a package would run.
    """

    def extend(self, folders: Iterable[str]) -> None:
        super().extend(folder for folder in folders if folder != os.getcwd() or folder in sys.path)


def _private_folder() -> str:
    """Return a folder for Ray's session, which Ray opens to everyone, below one that only this user can enter."""
    usual = tempfile.gettempdir()
    # Ray's Unix sockets lie in the folder, and their paths may have 107 characters.
    top = tempfile.mkdtemp(prefix="saltern-", dir=usual if len(usual) < 20 else "/tmp")  # noqa: S108
    atexit.register(_end_session, top)
    return f"{top}/ray"


def _end_session(folder: str) -> None:
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _alive() -> dict[str, dict[str, float]]:
    """Return the resources of the living nodes, by node."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def places(resources: Mapping[str, float], resource: str, each: float) -> int:
    """Return how many workers with `each` of a resource a node has place for, at least one."""
    return max(1, int(resources.get(resource, 0.0) / each + 1e-6))


@contextlib.contextmanager
def _reaching_cluster() -> Iterator[None]:
    """Raise ConnectionError, which stops the run with its finished shards, if Ray no longer answers the driver."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"the Ray cluster no longer answers: {' '.join(str(error).split())[:200]}") from error


def explain(worker: int, shard: Shard | None, error: Exception, *, machine_alive: bool) -> Event:
    """Return the event of any error that Ray raises for a call of an actor.

    Args:
        worker, shard: of the call; shard is None for the call that builds the processor.
        error: a RayError.
        machine_alive: whether the worker's machine is known to be alive. If it is not, no shard is blamed.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, BaseException) and not isinstance(cause, ray.exceptions.RayError):
        return Raised(worker, shard, cause)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()] or [type(error).__name__]
    if "creation task" in str(error) or (shard is None and isinstance(error, RayTaskError)):
        where = "Install the same packages on every node, and put your own module where every node can import it"
        return Raised(worker, None, UserError(f"a worker cannot load the code of the job: {lines[-1]}. {where}"))
    if isinstance(error, RayTaskError):
        return Raised(worker, shard, error)
    text = " ".join(lines)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Died(worker, "its node ran out of memory, and Ray ended it", blame=True)
    if isinstance(error, ray.exceptions.RayActorError) and not ("worker process has died" in text and machine_alive):
        return Died(worker, "its machine was lost or cannot be reached", blame=False)
    return Died(worker, text.split("Worker exit detail: ")[-1].split(". ")[0][:200], blame=True)


class _Worker:
    """The actor. Its processor is built by a call, not by the constructor, so that errors come back unchanged."""

    def build(self, factory: Factory, resource: str, each: float, workers: int) -> str:
        node = str(ray.get_runtime_context().get_node_id())
        machine.share(min(workers, places(_alive().get(node, {}), resource, each)))
        machine.keep_memory()
        self._processor: ShardProcessor = factory()
        return node

    def process(self, shard: Shard, earlier: Earlier) -> Made | MadeTogether:
        made: Made | MadeTogether = self._processor.process(shard, earlier)
        return made

    def images(self) -> dict[str, int]:
        return dict(self._processor.images)


class RayPool:
    """Workers that are actors of the cluster that `join_cluster` joined.

    Args:
        factory: builds a processor; travels to the actor.
        gpus: of each actor; fractions allowed.
        cpus: of each actor; None: as many as each actor of a node can have if its GPUs are all used, at most 16.
        torch_threads: of each actor.
        workers: how many there will be.
    """

    isolated = True

    def __init__(self, factory: Factory, *, gpus: float, cpus: float | None, torch_threads: int, workers: int = 1):
        nodes = [node for node in _alive().values() if node.get("GPU", 0.0) >= gpus]
        if cpus is None:
            shares = [node.get("CPU", 0.0) // min(workers, places(node, "GPU", gpus)) for node in nodes]
            cpus = max(1.0, min(16.0, min(shares, default=1.0)))
        # An actor that requests more cores than any node has would wait for ever.
        cpus = min(cpus, max((node.get("CPU", 0.0) for node in nodes), default=0.0) or cpus)
        self._arguments = (factory, "GPU" if gpus else "CPU", gpus or cpus, workers)
        environment = {
            **machine.ENVIRONMENT,
            "OMP_NUM_THREADS": str(torch_threads),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            naming.MODULES: os.getcwd(),
        }
        self._actor = ray.remote(_Worker).options(
            num_gpus=gpus,
            num_cpus=cpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,  # two shards, a count of images, and one to spare
            runtime_env={"env_vars": environment},
        )
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, Shard | None]] = {}  # by reference; None: the call that builds
        self._nodes: dict[int, str] = {}
        self._counting: dict[Any, int] = {}
        self._counts: dict[int, dict[str, int]] = {}
        self._asked = -COUNT_EVERY_S

    @_reaching_cluster()
    def start(self) -> int:
        number = next(self._numbers)
        self._actors[number] = self._actor.remote()
        self._calls[self._actors[number].build.remote(*self._arguments)] = (number, None)
        return number

    @_reaching_cluster()
    def submit(self, worker: int, shard: Shard, earlier: Earlier) -> None:
        self._calls[self._actors[worker].process.remote(shard, earlier)] = (worker, shard)

    @_reaching_cluster()
    def wait(self, timeout_s: float) -> list[Event]:
        if not self._calls:  # every remaining shard waits for its next attempt
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if not (ready or self._nodes or _alive()):  # this process's own node is lost too, so that no other can join
            raise ConnectionError("the Ray cluster has lost its last node; repeat the command")
        if ready:
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        events, dead = [], set()
        for reference in ready:
            worker, shard = self._calls.pop(reference)
            if worker in dead or worker not in self._actors:
                continue
            event = self._event(reference, worker, shard)
            if isinstance(event, Died):
                dead.add(worker)
            events.append(event)
        return events

    def _event(self, reference: Any, worker: int, shard: Shard | None) -> Event:
        try:
            value = ray.get(reference)
        except ray.exceptions.RayError as error:
            return explain(worker, shard, error, machine_alive=self._nodes.get(worker) in {None, *_alive()})
        if shard is None:
            self._nodes[worker] = value
            return Ready(worker)
        return Done(worker, shard, value)

    def kill(self, worker: int) -> None:
        with contextlib.suppress(Exception):  # it may be dead already, for many reasons
            ray.kill(self._actors[worker])
        del self._actors[worker]
        self._nodes.pop(worker, None)
        self._counts.pop(worker, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        self._counting = {ref: number for ref, number in self._counting.items() if number != worker}

    def images(self) -> dict[str, int]:
        """Return the counts of the last answers, without waiting for new ones."""
        if self._counting:
            answered, _ = ray.wait(list(self._counting), num_returns=len(self._counting), timeout=0)
            for reference in answered:
                with contextlib.suppress(ray.exceptions.RayError):
                    self._counts[self._counting[reference]] = ray.get(reference)
                del self._counting[reference]
        if not self._counting and time.monotonic() - self._asked > COUNT_EVERY_S:
            self._asked = time.monotonic()
            self._counting = {self._actors[number].images.remote(): number for number in self._nodes}
        return {name: count for counts in self._counts.values() for name, count in counts.items()}

    def close(self) -> None:
        for number in list(self._actors):
            self.kill(number)
