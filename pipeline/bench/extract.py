"""All figures of `saltern bench extract`: end-to-end rates and their limits, the cost of Ray, the gain of workers."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from saltern.pipeline.bench import footprint
from saltern.pipeline.bench.commands import RunRate, measure_run
from saltern.pipeline.bench.figures import Figure, by_turns, ratio
from saltern.pipeline.bench.several import gains
from saltern.pipeline.bench.workload import ExtractBench, make_images, read_images, write_shards
from saltern.pipeline.device import arithmetic, memory_format
from saltern.pipeline.extract.explain import AUTOCAST
from saltern.pipeline.extract.processor import AHEAD
from saltern.pipeline.machine import cores
from saltern.pipeline.methods import build
from saltern.pipeline.models import classifiers
from saltern.pipeline.shards.decoder import choose_decoder, make_decoder
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import square_of

GPU_GOAL = 8000.0  # images/s end to end
_COST = partial(Figure, "core time an image, Ray engine ÷ local engine", goal=1.03, unit="x", at_least=False)
_SCALING = partial(Figure, "2 actors on 2 cores ÷ 1 actor on 1 core", goal=1.85, unit="x", at_least=True)


def measure(bench: ExtractBench) -> Iterator[Figure]:
    """Yield every figure; takes minutes. On a GPU only those that depend on it, within four minutes."""
    with TemporaryDirectory(prefix="saltern-bench-") as name:
        folder = Path(name)
        images = read_images(bench.shards, bench.images) if bench.shards else make_images(bench.images)
        large = write_shards(folder / "large", images, bench.large_shards, 8 * bench.batch)
        if bench.device == "cuda":
            yield from on_gpu(bench, large)
            return
        small = write_shards(folder / "small", images, bench.batches, bench.batch)
        parts: dict[str, Callable[[], Sequence[Figure]]] = {
            "end to end, model-bound": lambda: model_bound(bench, small),
            "end to end, decode-bound": lambda: [decode_bound(bench, large, threads) for threads in _core_counts()],
            "several methods": lambda: gains(bench, small),
            "bytes stored": lambda: [footprint.stored(bench, write_shards(folder / "one", images, 1, len(images)))],
            "memory": lambda: [footprint.memory(bench, folder, images)],
            "resume": lambda: footprint.resume(bench, folder),
            "driver loop": lambda: [footprint.driver_loop(bench)],
            "start": lambda: [footprint.start(bench)],
            "engines": lambda: engines(replace(bench, precision="fp32"), small, large),
        }
        for number, (name, part) in enumerate(parts.items(), 1):
            print(f"{number}/{len(parts)} {name}", file=sys.stderr, flush=True)
            yield from part()


def on_gpu(bench: ExtractBench, shards: Path) -> list[Figure]:
    """Compare a run of one worker to the slower of its method and its decoder, each alone on the GPU."""
    runs: list[RunRate] = []

    def end_to_end() -> float:
        runs.append(measure_run(bench.extract(shards)))
        return runs[-1].images_s

    method, decode = partial(method_alone, bench, 1), partial(decode_alone, shards, AHEAD, "cuda", bench.batch)
    rates = dict(
        zip(("end to end", "method", "decode"), by_turns(bench.rounds, end_to_end, method, decode), strict=True)
    )
    found = {side: median(values) for side, values in rates.items()}
    slower, rate = min(("method", "decode"), key=found.__getitem__), found["end to end"]
    note = f"{rate:.1f} ÷ {found[slower]:.1f} images/s; method alone {found['method']:.1f}, "
    note += f"decoding alone {found['decode']:.1f}"
    where = f"{torch.cuda.get_device_name()}, {bench.precision}; ImageNet in {footprint.IMAGENET / rate / 60:.1f} min"
    miss, name = _phases(runs[-1]), f"end to end ÷ {slower} alone, the slower of method and decoding"
    return [
        Figure(name, rate / found[slower], 0.90, "x", True, note, miss, rates),
        Figure("end to end on this GPU", rate, GPU_GOAL, "images/s", True, where, miss),
    ]


def _core_counts() -> list[int]:
    """Return two numbers of torch threads: all cores but one (for the rest of the pipeline), and all cores."""
    return [cores() - 1, cores()] if cores() > 1 else [1]


def model_bound(bench: ExtractBench, shards: Path) -> list[Figure]:
    """Compare a run of one worker to only its method, on a preloaded batch."""
    every, figures = cores(), []
    for threads in _core_counts():
        decoders = 1 if threads < every else every
        run = partial(measure_run, bench.extract(shards, decode_threads=decoders), torch_threads=threads)
        name = f"end to end ÷ method alone, torch on {threads} of {every} cores"
        figures.append(_compared(name, 0.95, bench.rounds, run, partial(method_alone, bench, threads)))
    return figures


def decode_bound(bench: ExtractBench, shards: Path, threads: int) -> Figure:
    """Compare a run with a no-op method to only reading and decoding, in as many threads."""
    run = partial(measure_run, bench.extract(shards, noop=True, decode_threads=threads))
    name = "end to end with a no-op method ÷ reading + decoding alone"
    name += f", decode threads: {threads} on {cores()} cores"
    return _compared(name, 0.90, bench.rounds, run, lambda: decode_alone(shards, threads))


def _compared(name: str, goal: float, rounds: int, run: Callable[[], RunRate], alone: Callable[[], float]) -> Figure:
    runs: list[RunRate] = []

    def end_to_end() -> float:
        runs.append(run())
        return runs[-1].images_s

    rates = by_turns(rounds, end_to_end, alone)
    note = f"{median(rates[0]):.1f} ÷ {median(rates[1]):.1f} images/s"
    sides = {"end to end": rates[0], "alone": rates[1]}
    return Figure(name, ratio(*rates), goal, "x", True, note, _phases(runs[-1]), sides)


def _phases(run: RunRate) -> str:
    """Return where a run spent its time."""
    phases = ", ".join(f"{phase} {value:.2f}" for phase, value in run.thread_ms.items())
    return f"thread-ms an image: {phases}; the load was {os.getloadavg()[0]:.1f}"


def method_alone(bench: ExtractBench, torch_threads: int) -> float:
    """Return images/s of the method on one preloaded batch."""
    classifier = classifiers.load(bench.model, bench.weights)
    side, dtype = square_of(classifier.preprocess.crop), AUTOCAST.get(bench.precision)
    layout = memory_format(bench.precision, torch.device(bench.device))
    method = build(bench.method, classifier.model.to(bench.device).to(memory_format=layout))
    x_BCHW = torch.randn(bench.batch, 3, side, side).to(bench.device).contiguous(memory_format=layout)
    if dtype is not None:
        method.halve(x_BCHW[:1], dtype)

    def explain(batches: int) -> float:
        since = time.perf_counter()
        with arithmetic(bench.precision), torch.autocast(bench.device, dtype, dtype is not None):
            for _ in range(batches):
                method(x_BCHW)
        if bench.device == "cuda":
            torch.cuda.synchronize()
        return batches * bench.batch / (time.perf_counter() - since)

    # torch keeps its thread count for each calling thread.
    with ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(torch_threads)) as thread:
        thread.submit(explain, 2).result()  # warm up
        return thread.submit(explain, 8 * bench.large_shards if bench.device == "cuda" else bench.batches).result()


def decode_alone(shards: Path, threads: int, device: str = "cpu", images: int = 16) -> float:
    """Return images/s of only reading, in this thread, and decoding, in others.

    Args:
        shards: a folder of them.
        threads: that decode.
        device: cpu | cuda: of the decoder that a run there has.
        images: that a thread decodes at once.
    """
    decoder = make_decoder(Preprocess(), choose_decoder("auto", device), device, cores())
    since, count = time.perf_counter(), 0
    with ThreadPoolExecutor(threads) as pool:
        samples = (sample.image for shard in expand([str(shards)])[0] for sample in read_samples(shard))
        files = (image for image in samples if image is not None)
        done = []
        while some := list(islice(files, images)):
            done.append(pool.submit(decoder, some))
            count += len(some)
        for future in done:
            future.result()
    return count / (time.perf_counter() - since)


def engines(bench: ExtractBench, small: Path, large: Path) -> list[Figure]:
    """Measure both figures of the Ray engine on the CPU, or skip them with the reason."""
    try:
        return [_cost(bench, large), _scaling(bench, small)]
    except UserError as error:
        return [figure(value=None, note=str(error)) for figure in (_COST, _SCALING)]


def _engine_rate(bench: ExtractBench, shards: Path, noop: bool, engine: str, workers: int) -> float:
    """Return images/s of workers that have a core, a torch thread and a decoding thread each."""
    options = {"engine": engine, "decode_threads": 1} | ({"workers": workers} if engine == "ray" else {})
    return measure_run(bench.extract(shards, noop, **options), on_cores=workers).images_s


def _cost(bench: ExtractBench, shards: Path) -> Figure:
    """Compare runs with a no-op method on one core, so that time is core time and the engine's share is large."""
    sides = [partial(_engine_rate, bench, shards, True, engine, 1) for engine in ("ray", "local")]
    ray, local = ([1000 / rate for rate in rates] for rates in by_turns(bench.rounds, *sides))
    note = f"{median(ray):.3f} ÷ {median(local):.3f} core-ms, no-op method, everything on one core, Ray's daemons too"
    miss = f"{median(ray) - median(local):.3f} core-ms an image go to Ray"
    return _COST(value=ratio(ray, local), note=note, miss=miss, rounds={"ray": ray, "local": local})


def _scaling(bench: ExtractBench, shards: Path) -> Figure:
    if cores() < 2:
        return _SCALING(value=None, note="this machine has one core")
    two, one = by_turns(
        bench.rounds, *(partial(_engine_rate, bench, shards, False, "ray", workers) for workers in (2, 1))
    )
    note = f"{median(two):.2f} ÷ {median(one):.2f} images/s, {bench.method} of {bench.model}, runs under way"
    load = os.getloadavg()[0]
    miss = f"the driver, Ray's daemons and other processes (load {load:.1f}) take their share of the cores"
    return _SCALING(value=ratio(two, one), note=note, miss=miss, rounds={"2 actors": two, "1 actor": one})
