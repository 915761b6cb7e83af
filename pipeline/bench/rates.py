"""End-to-end rates against their limits, the method alone and reading + decoding alone; bytes stored."""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq
import torch

from saltern.pipeline.bench.figures import Figure, Side, by_turns, ratio
from saltern.pipeline.bench.workload import Layout, Resident, Settings, Work, drive, images, layouts, spec_for
from saltern.pipeline.engine.local import LocalPool
from saltern.pipeline.extract.explain import AUTOCAST
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor, Spec
from saltern.pipeline.machine import cores
from saltern.pipeline.methods import build
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.writer import Row, ShardWriter, read_rows
from saltern.pipeline.shards.decode import Decoded, DecodeError, decode
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.run import RunConfig

IMAGENET = 1_281_167  # images of its training set
GPU_GOAL = 5000.0  # images/s end to end
_AHEAD = 64  # images being decoded, at most


class MethodAlone:
    """The method on one preloaded batch, again and again, in a thread of its own as in a worker."""

    def __init__(self, config: RunConfig, device: str):
        self._config, self._device = config, torch.device(device)
        self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(config.torch_threads))
        self._thread.submit(self._build).result()

    def _build(self) -> None:
        config = self._config
        layout = torch.contiguous_format if config.precision == "fp32" else torch.channels_last
        model = classifiers.load(config.model, config.weights, seed=config.seed).model
        model = model.to(self._device).to(memory_format=layout)
        x_BCHW = torch.randn(config.batch_size, 3, config.crop, config.crop, device=self._device)
        self._x_BCHW = x_BCHW.contiguous(memory_format=layout)
        self._method = build(config.method, model, layer=next(iter(config.layer), None), **config.options)

    def __call__(self, count: float) -> int:
        """Batches that hold about `count` images; returns how many they hold."""
        batches = max(1, round(count / self._config.batch_size))
        self._thread.submit(self._run, batches).result()
        return batches * self._config.batch_size

    def _run(self, batches: int) -> None:
        kind, dtype = self._device.type, AUTOCAST.get(self._config.precision)
        with torch.autocast(kind, dtype, dtype is not None):
            for _ in range(batches):
                self._method(self._x_BCHW)
        if kind == "cuda":
            torch.cuda.synchronize()


class DecodeAlone:
    """Reading in this thread, decoding in `threads`, and nothing else."""

    def __init__(self, config: RunConfig, threads: int, work: Work):
        self._config, self._pool, self._work = config, ThreadPoolExecutor(threads), work

    def __call__(self, count: float) -> int:
        """About `count` images; returns how many."""
        waiting: deque[Future[Decoded]] = deque()
        done = 0
        for sample in (sample for shard in self._work.images(count) for sample in read_samples(shard)):
            done += 1
            if sample.image is not None:
                waiting.append(self._pool.submit(self._decode, sample.image))
            if len(waiting) > _AHEAD:
                self._settle(waiting.popleft())
        for decoding in waiting:
            self._settle(decoding)
        return done

    def _decode(self, data: bytes) -> Decoded:
        how = self._config
        return decode(data, resize=how.resize, crop=how.crop, squash=how.squash, interpolation=how.interpolation)

    def _settle(self, decoding: Future[Decoded]) -> None:
        with contextlib.suppress(DecodeError):
            decoding.result()


@dataclass(frozen=True)
class _Held:
    """What a run is held to."""

    name: str
    goal: float
    seconds: float  # of each side in each round, about
    rest: str  # what the run does beside its limit


def model_bound(settings: Settings, work: Work) -> list[Figure]:
    """A run of one worker ÷ its method alone on preloaded batches."""
    found = []
    for layout in layouts(settings.device, "model"):
        with spec_for(settings.request(), settings.device, layout) as spec:
            name = f"end to end ÷ method alone, {layout.name}"
            held = _Held(name, 0.95, settings.seconds, "reading, decoding, mask, box and row")
            found.append(_against(held, settings.rounds, work, spec, MethodAlone(spec.run.config, spec.device)))
    return found + ([_gpu_rate(settings, found[0])] if settings.device == "cuda" else [])


def decode_bound(settings: Settings, work: Work) -> list[Figure]:
    """A run with a no-op method ÷ reading + decoding alone in as many threads."""
    found = []
    for layout in layouts(settings.device, "decode"):
        with spec_for(settings.noop(), settings.device, layout) as spec:
            name = f"end to end with a no-op method ÷ reading + decoding alone, {layout.name}"
            held = _Held(name, 0.90, settings.seconds / 2, "normalising, mask, box and row")
            limit = DecodeAlone(spec.run.config, layout.decode_threads, work)
            found.append(_against(held, settings.rounds, work, spec, limit))
    return found


def _against(held: _Held, rounds: int, work: Work, spec: Spec, limit: Callable[[float], int]) -> Figure:
    """A run of one worker, that stands when the clock starts, ÷ what limits it."""
    batch = spec.run.config.batch_size
    pool = Resident(LocalPool(lambda: Processor(spec, Extraction)))
    drive(pool, work.images(2 * batch))
    limit(2 * batch)
    rate = Side(lambda: limit(4 * batch))()
    count = batch * max(1, round(rate * held.seconds / batch))  # whole batches, for both sides
    whole, part = Side(lambda: images(drive(pool, work.images(count)))), Side(lambda: limit(count))
    rates = by_turns(rounds, whole, part)
    end, alone = map(median, rates)
    note = f"{end:.1f} ÷ {alone:.1f} images/s; {whole.cost:.2f} and {part.cost:.2f} core-ms an image"
    miss = (
        f"{held.rest} take {whole.cost - part.cost:.2f} core-ms an image more; {end * whole.cost / 1000:.2f} "
        f"of {cores()} cores were had at a load of {os.getloadavg()[0]:.1f}"
    )
    sides = {"end to end": rates[0], "alone": rates[1]}
    return Figure(held.name, ratio(*rates), held.goal, "x", True, note, miss, sides)


def _gpu_rate(settings: Settings, model: Figure) -> Figure:
    """The absolute rate, which only a GPU is held to."""
    rates = model.rounds["end to end"]
    note = f"{torch.cuda.get_device_name()}, {settings.precision}; ImageNet in {IMAGENET / median(rates) / 60:.1f} min"
    miss = f"the method alone gives {median(model.rounds['alone']):.0f} images/s; see the rate of decoding"
    return Figure("end to end on this GPU", median(rates), GPU_GOAL, "images/s", True, note, miss)


def stored(settings: Settings, work: Work) -> Figure:
    """Bytes of masks and native maps an image, in one data file of all the images."""
    every = cores()
    with spec_for(settings.request(), settings.device, Layout("", every, every)) as spec:
        processor = Processor(spec, Extraction)
        rows: list[Row] = []
        for shard in work.shards:
            left = settings.stored_images - len(rows)
            if left > 0:
                processor.process(replace(shard, take=left))
                path = Path(spec.root, data_name(shard.name))
                rows += [row for found in read_rows(path).values() for row in found]
        with ShardWriter(Path(spec.scratch), pq.read_schema(path)) as writer:
            writer.write(rows)
            each = writer.close().size / len(rows)
    note = f"{each:.0f} bytes an image in a file of {len(rows)} rows, x {IMAGENET:,}; {_pictures(settings)}"
    miss = f"the masks alone may take {1e9 / IMAGENET:.0f} bytes"
    return Figure(
        "stored, ImageNet's training set, masks + native maps", each * IMAGENET / 1e9, 1.0, "GB", False, note, miss
    )


def _pictures(settings: Settings) -> str:
    weights = "random weights" if settings.weights == "none" else f"weights {settings.weights}"
    return f"{settings.method} of {settings.model}, {weights}, {'made pictures' if settings.made else 'photographs'}"
