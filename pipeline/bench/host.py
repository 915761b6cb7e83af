"""The figures of `saltern bench host`: a run's work on the host, with stand-ins of no cost for decoding and the method.

Shape suffixes: B batch, H W C an image's pixels and channels, h w the grid of a map, K classes.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saltern.pipeline.bench.figures import Figure
from saltern.pipeline.bench.gil import Unmeasurable, watched
from saltern.pipeline.bench.workload import Noop, write_shards
from saltern.pipeline.engine.driver import IN_FLIGHT
from saltern.pipeline.extract.extraction import Extraction
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.extract.task import Pending
from saltern.pipeline.machine import cores
from saltern.pipeline.methods.base import Maps
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.decode import Cut
from saltern.pipeline.shards.decoder import DecodedBatch, empty_batch
from saltern.pipeline.shards.sources import Data
from saltern.schemas.config import Preprocess
from saltern.schemas.run import Run

RATE_GOAL, GIL_GOAL = 12_000.0, 60.0  # images/s of a process; microseconds an image


@dataclass(frozen=True)
class HostBench:
    """Options of the measurement."""

    batch_size: int = 128
    rounds: int = 5
    image_bytes: Sequence[int] = (100_000, 4_000)
    shards: int = 4  # of a round
    each: int = 1_000  # samples of a shard


class Used(NamedTuple):
    """What one image costs in a round."""

    seconds: float
    cpu_us: float  # of all threads
    held_us: float  # of it, under the GIL


class Blobs(Noop):
    """Method that returns smooth 7 x 7 maps, another for each image of a batch, without a forward pass."""

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        _, logits_BK, target_B = super().compute(x_BCHW, target_B)
        noise_Bhw = torch.rand(len(x_BCHW), 3, 3, generator=torch.Generator().manual_seed(0))
        map_B1hw = torch.nn.functional.interpolate(noise_Bhw[:, None], size=(7, 7), mode="bicubic").clamp_min(0)
        return map_B1hw[:, 0].to(x_BCHW.device), logits_BK, target_B


class Still(Extraction):
    """Task of `extract` that gives each batch the results that it computed once."""

    def __init__(self, spec: Spec, device: torch.device):
        super().__init__(spec, device)
        shape, batch = spec.run.config.preprocess.shape, spec.run.config.batch_size
        pixels_BHWC = torch.zeros(batch, *shape, 3, dtype=torch.uint8)
        ready, self._device = super().__call__(pixels_BHWC, *[torch.zeros(batch, dtype=torch.long)] * 2), device
        explained, _ = ready.wait()
        self._columns = {name: torch.from_numpy(column) for name, column in explained.columns.items()}
        self._columns["status"] = torch.zeros(batch, dtype=torch.long)

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        ready = {name: column[: len(pixels_BHWC)] for name, column in self._columns.items()}
        return Pending(self._device).send(ready)


def measure(bench: HostBench) -> Iterator[Figure]:
    """Yield the rate, and the CPU time under the GIL, for each size of images."""
    for size in bench.image_bytes:
        with TemporaryDirectory(prefix="saltern-bench-") as folder:
            run = _run(bench, Path(folder, "in"), size)
            yield from _figures(bench, run, folder, f"images of {size / 1000:g} kB")


def _run(bench: HostBench, folder: Path, size: int) -> Run:
    rng = np.random.default_rng(0)
    images = [b"\xff\xd8\xff" + rng.bytes(size - 3) for _ in range(16)]
    shards = write_shards(folder, images, bench.shards, bench.each)
    request = ExtractRequest(
        shards=[str(shards)],
        model="saltern.pipeline.bench.workload:Net",
        method=f"{__name__}:Blobs",
        target="top1",
        batch_size=bench.batch_size,
        torch_threads=1,
    )
    return resolve(request, None, "cpu", 1)[0]


def _figures(bench: HostBench, run: Run, folder: str, what: str) -> Iterator[Figure]:
    with contextlib.ExitStack() as stack:
        try:
            held, reason = stack.enter_context(watched()).seconds, ""
        except Unmeasurable as error:
            held, reason = float, str(error)
        processor = Processor(Spec(run, folder, ".", "cpu", cores()), Still, Blank(run.config.preprocess))
        stack.callback(processor.close)
        _pass(processor, run, folder, held)  # warm up
        rounds = [_pass(processor, run, folder, held) for _ in range(bench.rounds)]
    yield _rate(f"host work, {what}", rounds)
    yield _held(f"CPU time under the GIL an image, {what}", rounds, reason)


def _rate(name: str, rounds: Sequence[Used]) -> Figure:
    rates = [1 / used.seconds for used in rounds]
    cpu = median(used.cpu_us for used in rounds)
    note = f"{cpu:.1f} us of CPU time an image on all {cores()} cores together; the load was {os.getloadavg()[0]:.1f}"
    miss = f"all of this CPU time on one core would allow {1e6 / cpu:,.0f}"
    return Figure(name, median(rates), RATE_GOAL, "images/s", True, note, miss, {"images/s": rates})


def _held(name: str, rounds: Sequence[Used], reason: str) -> Figure:
    if reason:
        return Figure(name, None, GIL_GOAL, "us", False, reason)
    every = [used.held_us for used in rounds]
    held, cpu = median(every), median(used.cpu_us for used in rounds)
    note = f"{held / cpu:.0%} of {cpu:.1f} us of CPU time an image; {min(every):.1f} to {max(every):.1f}"
    return Figure(name, held, GIL_GOAL, "us", False, note, f"the load was {os.getloadavg()[0]:.1f}", {"us": every})


class Blank:
    """Decoder of images of 500 x 375, on a device without memory: it gets whole batches, as that of a GPU."""

    name, device = "blank", torch.device("meta")

    def __init__(self, preprocess: Preprocess):
        self._crop = preprocess.crop

    def __call__(self, images: Sequence[Data], cuts: Sequence[Cut] | None = None) -> DecodedBatch:
        batch = empty_batch(len(images), self._crop, self.device)
        batch.size_B2[:], batch.geometry_B4[:] = (375, 500), (1.5, 1.5, 80.0, 20.0)
        return batch


def _pass(processor: Processor, run: Run, folder: str, held: Callable[[], float]) -> Used:
    """Process all shards, as many at once as a worker does, and remove the output.

    Args:
        held: returns the seconds of CPU time under the GIL up to now.
    """
    cpu, under, since = time.process_time(), held(), time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        made = list(pool.map(processor.process, run.shards))
    seconds, cpu, under = time.perf_counter() - since, time.process_time() - cpu, held() - under
    for each in made:
        for name in each.files.values():
            Path(folder, name).unlink()
    images = sum(each.receipt.samples for each in made)
    return Used(seconds / images, 1e6 * cpu / images, 1e6 * under / images)
