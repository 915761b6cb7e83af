"""Compare Ray to the local engine, two actors to one, and a training by two workers to one by one worker."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from saltern.pipeline.bench.figures import Figure, Side, by_turns, ratio
from saltern.pipeline.bench.workload import ExtractBench, Supply, drive, images, make_shards, spec_for
from saltern.pipeline.casm.training.journal import EVERY
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.engine.pool import Event, Pool, Ready
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.machine import cores
from saltern.pipeline.runs.outlet import Spec
from saltern.schemas.errors import UserError

_COST = partial(Figure, "core time an image, Ray engine ÷ local engine", goal=1.03, unit="x", at_least=False)
_SCALING = partial(Figure, "2 actors on 2 cores ÷ 1 actor on 1 core", goal=1.85, unit="x", at_least=True)
MakePool = Callable[..., Pool]


def engines(bench: ExtractBench, supply: Supply, connect: Callable[[], object]) -> list[Figure]:
    """Measure both figures of the Ray engine on the CPU, or skip them with the reason.

    Args:
        connect: joins or starts a Ray cluster with 2 CPUs; raises ImportError or UserError if it cannot.
    """
    bench = replace(bench, device="cpu", precision="fp32")
    try:
        import psutil  # type: ignore[import-untyped]  # noqa: F401

        connect()
        from saltern.pipeline.engine.actors import RayPool
    except (ImportError, UserError) as error:
        return [figure(value=None, note=str(error)) for figure in (_COST, _SCALING)]
    make = partial(RayPool, gpus=0, cpus=1, torch_threads=1, import_paths=[])
    scaling = _SCALING(value=None, note="this machine has one core") if cores() < 2 else _scaling(bench, supply, make)
    return [_cost(bench, supply, make), scaling]


def _cost(bench: ExtractBench, supply: Supply, make: MakePool) -> Figure:
    """Compare core times with a no-op method, so that the engine's share is large. All share one core."""
    import psutil

    with spec_for(bench.noop(), "cpu", 1, 1) as spec, _actors(spec, make, supply, 1) as (actor, pids):
        process, processor = psutil.Process(pids[0]), Processor(spec, Extraction)

        def cpu_s() -> float:
            used = process.cpu_times()
            return time.process_time() + float(used.user + used.system)

        def local(count: float) -> int:
            return images(drive(LocalPool(lambda: processor), supply.images(count)))

        every = os.sched_getaffinity(0)
        _pin(os.getpid(), sorted(every)[:1])
        try:
            count = bench.seconds / 2 * Side(lambda: local(8 * bench.batch))()
            ray = Side(lambda: images(drive(actor, supply.images(count))), cpu_s)
            here = Side(lambda: local(count), cpu_s)
            by_turns(bench.rounds, ray, here)
        finally:
            _pin(os.getpid(), every)
    note = (
        f"{ray.cost:.3f} ÷ {here.cost:.3f} core-ms, no-op method, workers already started; driver and worker count, "
        "Ray's own daemons do not"
    )
    miss = f"{ray.cost - here.cost:.3f} core-ms an image go to the calls between driver and actor"
    rounds = {"ray": ray.core_ms, "local": here.core_ms}
    return _COST(value=ray.cost / here.cost, note=note, miss=miss, rounds=rounds)


def _scaling(bench: ExtractBench, supply: Supply, make: MakePool) -> Figure:
    with spec_for(bench.request(), "cpu", 1, 1) as spec, _actors(spec, make, supply, 2) as (actors, _):
        batch = bench.batch
        rate = Side(lambda: images(drive(actors, supply.images(2 * batch, batch))))()
        shards = max(1, round(rate * bench.seconds / batch))
        two = Side(lambda: images(drive(actors, supply.images(2 * shards * batch, batch), 2)))
        one = Side(lambda: images(drive(actors, supply.images(shards * batch, batch))))
        rates = by_turns(bench.rounds, two, one)
    note = (
        f"{median(rates[0]):.2f} ÷ {median(rates[1]):.2f} images/s, {bench.method} of {bench.model}, from the first "
        "shard handed out to the last receipt, actors already started"
    )
    miss = (
        f"the driver, Ray's daemons and other processes (load {os.getloadavg()[0]:.1f}) take their share of the cores"
    )
    return _SCALING(value=ratio(*rates), note=note, miss=miss, rounds={"2 actors": rates[0], "1 actor": rates[1]})


@contextmanager
def _actors(spec: Spec, make: MakePool, supply: Supply, count: int) -> Iterator[tuple["WarmPool", list[int]]]:
    """Yield a pool of actors, each bound to a core, and their process ids."""
    pool = WarmPool(make(partial(Processor, spec, Extraction)), count)
    try:
        batch = spec.run.config.batch_size
        receipts = drive(pool, supply.images(2 * count * batch, batch), count)
        pids = sorted({int(receipt.worker.rpartition(":")[2]) for receipt in receipts})
        for pid, core in zip(pids, sorted(os.sched_getaffinity(0)), strict=False):
            _pin(pid, [core])
        yield pool, pids
    finally:
        pool.end()


def _pin(pid: int, cores: Iterable[int]) -> None:
    """Bind all threads of a process to cores. Threads that they start inherit it."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


class WarmPool:
    """A pool that keeps its workers between drives, so that no drive includes their start."""

    def __init__(self, pool: Pool, workers: int):
        self._pool, self._ready = pool, list[Event]()
        self._workers = [pool.start() for _ in range(workers)]
        self._idle = list(self._workers)
        self.submit, self.images, self.end = pool.submit, pool.images, pool.close
        starting = set(self._workers)
        while starting:
            for event in pool.wait(1.0):
                if not isinstance(event, Ready):
                    raise UserError(f"a worker did not start: {event}")
                starting.discard(event.worker)

    def start(self) -> int:
        worker = self._idle.pop()
        self._ready.append(Ready(worker))
        return worker

    def wait(self, timeout_s: float) -> list[Event]:
        events, self._ready = self._ready, []
        return events or self._pool.wait(timeout_s)

    def kill(self, worker: int) -> None:
        raise UserError("a worker died while it was measured")

    def close(self) -> None:
        """End a drive; the workers stay until `end`."""
        self._idle = list(self._workers)


@dataclass(frozen=True)
class TrainingBench:
    """Trainings of CASM by several workers and by one, at the same global batch."""

    command: Sequence[str]  # that runs `saltern`
    workers: int = 2
    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 32  # of all workers together
    side: int = 64  # pixels: in a small step, the exchange of gradients weighs more than at 224
    readings: int = 2  # of a run's speed; one more, the first, is left out
    rounds: int = 3
    images: int = 256  # in four shards, small, so that decoding costs little


def training_gain(bench: TrainingBench) -> dict[str, Any]:
    """Return images/s with several workers ÷ with one; or `skipped`, the reason."""
    kind, present = ("GPU", torch.cuda.device_count()) if bench.device == "cuda" else ("core", cores())
    lacking = f"{bench.workers} workers, and {present} {kind}{'s' * (present != 1)}"
    entry: dict[str, Any] = {"workers": bench.workers, "skipped": lacking if present < bench.workers else None}
    if entry["skipped"]:
        return entry
    rates: dict[int, list[float]] = {bench.workers: [], 1: []}
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        make_shards(Path(folder, "shards"), 4, bench.images // 4, 150, 200)
        try:
            for number in range(bench.rounds):
                for workers in rates if number % 2 == 0 else reversed(rates):
                    rates[workers] += _train(bench, Path(folder, "shards"), workers)
        except UserError as error:
            return {**entry, "skipped": str(error)}
    speeds = {workers: median(values) for workers, values in rates.items()}
    return {**entry, "images_per_s": speeds, "gain": speeds[bench.workers] / speeds[1], "rounds": rates}


def _train(bench: TrainingBench, shards: Path, workers: int) -> list[float]:
    """Return images/s of a training, without its start. On a CPU, each worker has one core and one thread."""
    options = {
        "model": bench.model,
        "weights": "none",
        "batch-size": bench.batch_size,
        "side": bench.side,
        "epochs": 1,
        "steps-per-epoch": EVERY * (1 + bench.readings),
        "decode-threads": 1,
        "device": bench.device,
        "workers": workers,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    on_cpu = bench.device == "cpu"
    with TemporaryDirectory(prefix="saltern-bench-") as out:
        ended = subprocess.run(
            [*bench.command, "train-casm", str(shards), "--out", out, *words],
            env=os.environ | ({"OMP_NUM_THREADS": "1"} if on_cpu else {}),
            preexec_fn=partial(_pin_to_first, workers) if on_cpu else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise UserError(f"train-casm --workers {workers} failed: {' '.join(ended.stderr.split())[-300:]}")
        lines = Path(out, "speed.jsonl").read_text().splitlines()
    return [json.loads(line)["images_per_s"] for line in lines][1:]


def _pin_to_first(count: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def training_line(entry: dict[str, Any], bench: TrainingBench) -> str:
    """Return the entry as a line of Markdown."""
    name = f"train-casm, {entry['workers']} workers ÷ 1 worker at the same global batch"
    if entry["skipped"]:
        return f"- {name}: skipped, {entry['skipped']}."
    speeds = entry["images_per_s"]
    each = "a core and a torch thread each" if bench.device == "cpu" else "a GPU each"
    return (
        f"- {name}: {entry['gain']:.2f} x ({speeds[entry['workers']]:.1f} ÷ {speeds[1]:.1f} images/s; {each}, L100, "
        f"fp32, {bench.model} at {bench.side} x {bench.side}, batch {bench.batch_size} in all; no goal is set)."
    )
