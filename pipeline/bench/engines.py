"""Ray against the local engine, and two actors against one; each worker has a core of its own."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from saltern.pipeline.bench.figures import Figure, Side, by_turns, ratio, skipped
from saltern.pipeline.bench.workload import Layout, Resident, Settings, Work, drive, images, spec_for
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.pool import Pool
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor, Spec
from saltern.schemas.errors import UserError

_COST = ("core time an image, Ray engine ÷ local engine", 1.03, "x", False)
_SCALING = ("2 actors on 2 cores ÷ 1 actor on 1 core", 1.85, "x", True)
_LAYOUT = Layout("", 1, 1)
MakePool = Callable[..., Pool]


def engines(settings: Settings, work: Work, connect: Callable[[], object]) -> list[Figure]:
    """Both figures, on the CPU; skipped with the reason where there is no Ray.

    Args:
        connect: joins or starts a Ray cluster with 2 CPUs.
    """
    settings, two = replace(settings, device="cpu", precision="fp32"), sorted(os.sched_getaffinity(0))[:2]
    try:
        import psutil  # type: ignore[import-untyped]

        connect()
        from saltern.pipeline.engine.actors import RayPool
    except (ImportError, UserError) as error:
        return [skipped(*_COST, str(error)), skipped(*_SCALING, str(error))]
    make = partial(RayPool, gpus=0, cpus=1, torch_threads=1, import_paths=[])
    scaling = _scaling(settings, work, make, two) if len(two) == 2 else skipped(*_SCALING, "there is one core")
    return [_cost(settings, work, make, two[:1], psutil.Process), scaling]


def _cost(
    settings: Settings, work: Work, make: MakePool, core: Sequence[int], process_of: Callable[[int], Any]
) -> Figure:
    """With a no-op method, as the least work is the hardest to hold an engine against."""
    with spec_for(settings.noop(), "cpu", _LAYOUT) as spec, _actors(spec, make, core) as actor, _on(core):
        local = Resident(LocalPool(partial(Processor, spec, Extraction)))
        worker = drive(actor, work.images(settings.batch))[0].worker
        process = process_of(int(worker.rpartition(":")[2]))

        def cpu_s() -> float:
            used = process.cpu_times()
            return time.process_time() + float(used.user + used.system)

        count = settings.seconds / 2 * Side(lambda: images(drive(local, work.images(8 * settings.batch))))()
        ray = Side(lambda: images(drive(actor, work.images(count))), cpu_s)
        here = Side(lambda: images(drive(local, work.images(count))), cpu_s)
        by_turns(settings.rounds, ray, here)
    note = (
        f"{ray.cost:.3f} ÷ {here.cost:.3f} core-ms, no-op method, workers that stand; driver and worker are counted, "
        "Ray's own daemons are not"
    )
    miss = f"{ray.cost - here.cost:.3f} core-ms an image go to the calls between driver and actor"
    rounds = {"ray": ray.core_ms, "local": here.core_ms}
    return Figure(_COST[0], ray.cost / here.cost, *_COST[1:], note, miss, rounds)


def _scaling(settings: Settings, work: Work, make: MakePool, cores: Sequence[int]) -> Figure:
    with spec_for(settings.request(), "cpu", _LAYOUT) as spec, _actors(spec, make, cores) as actors:
        batch = settings.batch
        drive(actors, work.images(4 * batch, batch), 2)
        rate = Side(lambda: images(drive(actors, work.images(2 * batch, batch))))()
        shards = max(1, round(rate * settings.seconds / batch))
        two = Side(lambda: images(drive(actors, work.images(2 * shards * batch, batch), 2)))
        one = Side(lambda: images(drive(actors, work.images(shards * batch, batch))))
        rates = by_turns(settings.rounds, two, one)
    note = (
        f"{median(rates[0]):.2f} ÷ {median(rates[1]):.2f} images/s, {settings.method} of {settings.model}, from the "
        "first shard handed out to the last receipt, actors that stand"
    )
    miss = f"the driver, Ray's daemons and the load of others ({os.getloadavg()[0]:.1f}) take their share of the cores"
    return Figure(_SCALING[0], ratio(*rates), *_SCALING[1:], note, miss, {"2 actors": rates[0], "1 actor": rates[1]})


@contextlib.contextmanager
def _actors(spec: Spec, make: MakePool, cores: Sequence[int]) -> Iterator[Resident]:
    """One actor for each of the cores, bound to it."""
    with TemporaryDirectory() as claims:
        actors = Resident(make(partial(bound, spec, claims, tuple(cores))), len(cores))
        try:
            yield actors
        finally:
            actors.end()


def bound(spec: Spec, claims: str, cores: Sequence[int]) -> Processor:
    """A processor in a process bound to the first of the cores that no other has claimed."""
    for core in cores:
        with contextlib.suppress(FileExistsError):
            Path(claims, str(core)).touch(exist_ok=False)
            _bind([core])
            return Processor(spec, Extraction)
    raise RuntimeError("more workers than cores")


def _bind(cores: Sequence[int]) -> None:
    """All threads of this process; those that follow inherit it."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), cores)


@contextlib.contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    _bind(cores)
    try:
        yield
    finally:
        _bind(sorted(before))
