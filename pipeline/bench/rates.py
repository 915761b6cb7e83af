"""End-to-end rates against their limits: the method alone, and reading + decoding alone."""

import contextlib
import statistics
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipeline import classifiers
from pipeline.bench.figures import Figure, Side, by_turns, ratio
from pipeline.bench.settings import NOOP, Layout, Settings
from pipeline.bench.workload import Resident, Work, drive, images, spec_for
from pipeline.decode import Decoded, DecodeError, decode
from pipeline.explain import AUTOCAST
from pipeline.extractor import Processor, Spec
from pipeline.manifest import data_name
from pipeline.methods import build
from pipeline.pool import LocalPool
from pipeline.shards import read_samples
from pipeline.writer import ShardWriter, read_rows
from schemas.run import RunConfig, Shard

IMAGENET = 1_281_167  # images of its training set
PER_SHARD = 1000  # rows a file, as `saltern pack` makes them
_DECODING = 64  # images read ahead of the slowest decoding


class MethodAlone:
    """The method on one preloaded batch, again and again, in a thread of its own as in a worker."""

    def __init__(self, config: RunConfig, device: str):
        self._config, self._device = config, torch.device(device)
        self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(config.torch_threads))
        self._thread.submit(self._build).result()

    def _build(self) -> None:
        config = self._config
        model = classifiers.load(config.model, config.weights, seed=config.seed).model.to(self._device)
        self._x_BCHW = torch.randn(config.batch_size, 3, config.crop, config.crop, device=self._device)
        if config.precision != "fp32":
            model = model.to(memory_format=torch.channels_last)
            self._x_BCHW = self._x_BCHW.contiguous(memory_format=torch.channels_last)
        self._method = build(config.method, model, layer=next(iter(config.layer), None), **config.options)

    def __call__(self, images: float) -> int:
        """As many batches as hold so many images; returns how many they hold."""
        return self._thread.submit(self._run, max(1, round(images / self._config.batch_size))).result()

    def _run(self, batches: int) -> int:
        kind, precision = self._device.type, self._config.precision
        with torch.autocast(kind, AUTOCAST.get(precision), precision in AUTOCAST):
            for _ in range(batches):
                self._method(self._x_BCHW)
        if kind == "cuda":
            torch.cuda.synchronize()
        return batches * self._config.batch_size


def model_bound(settings: Settings, work: Work, layout: Layout) -> Figure:
    """A run of one worker ÷ its method alone."""
    with spec_for(settings, work, layout) as spec:
        pool = Resident(LocalPool(lambda: Processor(spec)))
        alone = MethodAlone(spec.run.config, spec.device)
        alone(2 * settings.batch)
        count = Side(lambda: alone(2 * settings.batch))() * settings.seconds
        whole, part = Side(lambda: images(drive(pool, work.images(count)))), Side(lambda: alone(count))
        drive(pool, work.images(settings.batch))
        rates = by_turns(settings.rounds, whole, part)
    title = f"extract, model-bound, {layout.name}"
    return _compare(title, 0.95, rates, whole, part, f"{settings.method} of {settings.model} alone")
