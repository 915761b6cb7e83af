"""All figures of `saltern bench extract`, and the comparison of end-to-end rates to their limits."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from saltern.pipeline.bench import footprint
from saltern.pipeline.bench.figures import Figure, Side, by_turns, ratio
from saltern.pipeline.bench.workers import engines
from saltern.pipeline.bench.workload import ExtractBench, Supply, drive, images, make_shards, spec_for
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.extract.explain import AUTOCAST
from saltern.pipeline.extract.extraction import Extraction, load_method
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.machine import cores
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.decode import DecodeError, decode
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.config import ExtractConfig

GPU_GOAL = 5000.0  # images/s end to end
_AHEAD = 64  # largest number of images that are being decoded
_SHARDS = 4  # that the bench makes


def measure(bench: ExtractBench, connect: Callable[[], object]) -> list[Figure]:
    """Measure every figure; takes minutes.

    Args:
        connect: joins or starts a Ray cluster with 2 CPUs; raises ImportError or UserError if it cannot.
    """
    figures: list[Figure] = []
    with _with_shards(bench) as bench:
        supply = Supply.of(bench.shards)
        parts: dict[str, Callable[[], list[Figure]]] = {
            "end to end, model-bound": lambda: model_bound(bench, supply),
            "end to end, decode-bound": lambda: decode_bound(bench, supply),
            "bytes stored": lambda: [footprint.stored(bench, supply)],
            "memory": lambda: [footprint.memory(bench)],
            "resume": lambda: footprint.resume(bench),
            "driver loop": lambda: [footprint.driver_loop(bench)],
            "start": lambda: [footprint.start(bench)],
            "engines": lambda: engines(bench, supply, connect),  # last, because Ray's daemons stay
        }
        for number, (name, part) in enumerate(parts.items(), 1):
            print(f"{number}/{len(parts)} {name}", file=sys.stderr, flush=True)
            figures += part()
    return figures


@contextmanager
def _with_shards(bench: ExtractBench) -> Iterator[ExtractBench]:
    if bench.shards:
        yield bench
        return
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        path = Path(folder, "shards")
        make_shards(path, _SHARDS, max(bench.stored_images // _SHARDS, 8 * bench.batch))
        yield replace(bench, shards=[str(path)], made=True)


@dataclass(frozen=True)
class Limit:
    """A part of a run's work, whose rate the run cannot exceed, and the goal for the run's rate ÷ this rate."""

    name: str
    goal: float
    seconds: float  # of each side in each round, about
    alone: Callable[[float], int]  # processes about so many images, returns how many
    rest: str  # the run's other work


def model_bound(bench: ExtractBench, supply: Supply) -> list[Figure]:
    """Compare a run of one worker to only its method, on a preloaded batch."""
    every = cores()
    layouts = [(f"torch on {count} of {every} cores", count, 1 if count < every else every) for count in _core_counts()]
    if bench.device == "cuda":
        layouts = [("GPU", 1, min(16, every))]
    figures = []
    for name, torch_threads, decode_threads in layouts:
        with spec_for(bench.request(), bench.device, torch_threads, decode_threads) as spec:
            rest = "reading, decoding, mask, box and row"
            name = f"end to end ÷ method alone, {name}"
            figures.append(_compared(Limit(name, 0.95, bench.seconds, MethodAlone(spec), rest), bench, supply, spec))
    return figures + ([_gpu_rate(bench, figures[0])] if bench.device == "cuda" else [])


def decode_bound(bench: ExtractBench, supply: Supply) -> list[Figure]:
    """Compare a run with a no-op method to only reading and decoding, in as many threads."""
    figures = []
    for threads in _core_counts():
        with spec_for(bench.noop(), bench.device, 1, threads) as spec:
            name = "end to end with a no-op method ÷ reading + decoding alone"
            name, alone = f"{name}, decode threads: {threads} on {cores()} cores", DecodeAlone(spec, supply)
            limit = Limit(name, 0.90, bench.seconds / 2, alone, "normalising, mask, box and row")
            figures.append(_compared(limit, bench, supply, spec))
    return figures


def _core_counts() -> list[int]:
    """Return two numbers of torch threads: all cores but one (for the rest of the pipeline), and all cores."""
    return [cores() - 1, cores()] if cores() > 1 else [1]


def _compared(limit: Limit, bench: ExtractBench, supply: Supply, spec: Spec) -> Figure:
    """Compare a run of one worker, built before the clock starts, to its limit."""
    batch, processor = spec.run.config.batch_size, Processor(spec, Extraction)

    def run(count: float) -> int:
        return images(drive(LocalPool(lambda: processor), supply.images(count)))

    run(2 * batch)
    limit.alone(2 * batch)
    rate = Side(lambda: limit.alone(4 * batch))()
    count = batch * max(1, round(rate * limit.seconds / batch))  # whole batches, for both sides
    whole, part = Side(lambda: run(count)), Side(lambda: limit.alone(count))
    rates = by_turns(bench.rounds, whole, part)
    end, alone = map(median, rates)
    note = f"{end:.1f} ÷ {alone:.1f} images/s; {whole.cost:.2f} and {part.cost:.2f} core-ms an image"
    miss = (
        f"{limit.rest} take {whole.cost - part.cost:.2f} core-ms an image more; the run had "
        f"{end * whole.cost / 1000:.2f} of {cores()} cores at a load of {os.getloadavg()[0]:.1f}"
    )
    sides = {"end to end": rates[0], "alone": rates[1]}
    return Figure(limit.name, ratio(*rates), limit.goal, "x", True, note, miss, sides)


def _gpu_rate(bench: ExtractBench, model: Figure) -> Figure:
    rates = model.rounds["end to end"]
    minutes = footprint.IMAGENET / median(rates) / 60
    note = f"{torch.cuda.get_device_name()}, {bench.precision}; ImageNet in {minutes:.1f} min"
    miss = f"the method alone gives {median(model.rounds['alone']):.0f} images/s; see the rate of decoding"
    return Figure("end to end on this GPU", median(rates), GPU_GOAL, "images/s", True, note, miss)


class MethodAlone:
    """The method on one preloaded batch, in its own thread as in a worker."""

    def __init__(self, spec: Spec):
        self._config, self._device = spec.run.config_of(ExtractConfig), torch.device(spec.device)
        # torch keeps its thread count for each calling thread.
        self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(self._config.torch_threads))
        self._method = self._thread.submit(lambda: load_method(self._config, self._device)[1]).result()
        layout = torch.contiguous_format if self._config.precision == "fp32" else torch.channels_last
        side = self._config.preprocess.crop
        x_BCHW = torch.randn(self._config.batch_size, 3, side, side)
        self._x_BCHW = x_BCHW.to(self._device).contiguous(memory_format=layout)

    def __call__(self, count: float) -> int:
        """Explain batches that hold about `count` images. Returns how many images they hold."""
        batches = max(1, round(count / self._config.batch_size))
        self._thread.submit(self._run, batches).result()
        return batches * self._config.batch_size

    def _run(self, batches: int) -> None:
        dtype = AUTOCAST.get(self._config.precision)
        with torch.autocast(self._device.type, dtype, dtype is not None):
            for _ in range(batches):
                self._method(self._x_BCHW)
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class DecodeAlone:
    """Only reading, in this thread, and decoding, in the run's number of threads."""

    def __init__(self, spec: Spec, supply: Supply):
        self._config, self._supply = spec.run.config, supply
        self._pool = ThreadPoolExecutor(spec.decode_threads)

    def __call__(self, count: float) -> int:
        """Read and decode about `count` images. Returns how many."""
        decoding: deque[Future[None]] = deque()
        done = 0
        for shard in self._supply.images(count):
            for sample in islice(read_samples(shard), shard.take):
                done += 1
                if sample.image is not None:
                    decoding.append(self._pool.submit(self._decode, sample.image))
                if len(decoding) > _AHEAD:
                    decoding.popleft().result()
        for future in decoding:
            future.result()
        return done

    def _decode(self, data: bytes) -> None:
        with suppress(DecodeError):
            decode(data, self._config.preprocess)
