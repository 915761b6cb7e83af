"""Shards to measure on, workers that outlive a drive, and one timed drive."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.pool import Died, Event, Pool, Raised, Ready
from saltern.pipeline.extract.processor import Spec
from saltern.pipeline.extract.request import BATCH_SIZE, ExtractRequest, resolve
from saltern.pipeline.machine import cores
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import Store, session
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Shard

HEIGHT, WIDTH, QUALITY = 375, 500, 92  # as ImageNet's, about 110 kB a photograph


@dataclass(frozen=True)
class Layout:
    """Who gets the cores."""

    name: str
    torch_threads: int
    decode_threads: int


def make_shards(folder: Path, shards: int, each: int, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Shards of `each` JPEGs that cost as much as photographs: crops of noise with their 1/f spectrum."""
    rng = np.random.default_rng(0)
    scene_HWC = _scene(rng, 2 * height, 2 * width)
    folder.mkdir(parents=True)
    for shard in range(shards):
        with TarWriter(str(folder / f"shard-{shard:06}.tar"), encoder=False, mtime=0) as tar:
            for number in range(shard * each, (shard + 1) * each):
                y, x = rng.integers(height), rng.integers(width)
                stream = io.BytesIO()
                Image.fromarray(scene_HWC[y : y + height, x : x + width]).save(stream, "JPEG", quality=QUALITY)
                tar.write({"__key__": f"{number:08}", "jpg": stream.getvalue(), "cls": str(number % 1000).encode()})


def _scene(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency_HW[0, 0] = np.inf
    # Channels of a photograph are much alike: the shared part first, then a third as much of each by itself.
    planes_CHW = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / frequency_HW).real for _ in range(4)]
    mixed_HWC = np.stack([planes_CHW[0] + plane / 3 for plane in planes_CHW[1:]], 2)
    bytes_HWC: NDArray[np.uint8] = (128 + 50 * mixed_HWC / mixed_HWC.std()).clip(0, 255).astype(np.uint8)
    return bytes_HWC


@dataclass(frozen=True)
class Work:
    """Shards with their numbers of samples; any amount of work is made by going round them."""

    shards: list[Shard]
    samples: list[int]

    @classmethod
    def of(cls, patterns: Sequence[str]) -> "Work":
        """The shards that the patterns name. Raises UserError where they hold no samples."""
        shards, _ = expand(patterns)
        samples = [len(list_keys(shard)) for shard in shards]
        if not any(samples):
            raise UserError("the shards to measure on hold no samples")
        return cls(shards, samples)

    def images(self, count: float, each: int | None = None) -> list[Shard]:
        """Shards that hold so many images, at most `each` a shard, every one under a name of its own."""
        left, wanted = max(1, round(count)), list[Shard]()
        for shard, samples in cycle(zip(self.shards, self.samples, strict=True)):
            take = min(left, samples, each or samples)
            wanted.append(replace(shard, name=f"{len(wanted):06}", take=take))
            left -= take
            if not left:
                break
        return wanted


@contextmanager
def spec_for(request: ExtractRequest, device: str, layout: Layout) -> Iterator[Spec]:
    """A processor's spec for a run in a temporary folder."""
    run, _ = resolve(replace(request, torch_threads=layout.torch_threads), None, device, 1)
    with TemporaryDirectory(prefix="saltern-bench-") as root, session(Store(root)) as scratch:
        yield Spec(run, root, str(scratch), device, layout.decode_threads)


class Blank:
    """A book in which nothing stands and nothing is written."""

    def standing(self, shard: Shard) -> Receipt | None:
        return None

    def succeeded(self, receipt: Receipt) -> None: ...

    def failed(self, failure: Failure) -> None: ...


class Resident:
    """Workers that stand before a drive begins and outlive it, so that no start-up is timed."""

    def __init__(self, pool: Pool, workers: int = 1):
        self._pool = pool
        self._numbers = [pool.start() for _ in range(workers)]
        self._begun: list[int] = []
        self._ready: list[Event] = []
        waiting = set(self._numbers)
        while waiting:
            for event in pool.wait(1.0):
                if isinstance(event, Raised):
                    raise event.error
                if isinstance(event, Died):
                    raise UserError(f"a worker died before it was ready: {event.reason}")
                waiting.discard(event.worker)
        self.submit, self.images = pool.submit, pool.images

    def start(self) -> int:
        number = self._numbers[len(self._begun)]
        self._begun.append(number)
        self._ready.append(Ready(number))
        return number

    def wait(self, timeout_s: float) -> list[Event]:
        events, self._ready = self._ready, []
        return events or self._pool.wait(timeout_s)

    def kill(self, worker: int) -> None:
        raise UserError("a worker died while it was measured")

    def close(self) -> None:
        """The drive is over; the workers stay until `end`."""
        self._begun = []

    def end(self) -> None:
        self._pool.close()


def drive(pool: Resident, shards: Sequence[Shard], workers: int = 1) -> list[Receipt]:
    """All shards through workers that stand. Raises UserError where one fails."""
    outcome = Driver(pool, Blank(), workers=workers).run(shards)
    for failure in outcome.failures.values():
        raise UserError(f"cannot measure on {failure.shard}: {failure.reason}")
    return list(outcome.receipts.values())


def images(receipts: Sequence[Receipt]) -> int:
    return sum(receipt.samples for receipt in receipts)


@dataclass(frozen=True)
class Settings:
    """The defaults take about nine minutes on two cores."""

    command: Sequence[str]  # that runs `saltern`
    shards: Sequence[str] = ()  # as `extract` takes them
    made: bool = False  # they hold made pictures, no photographs
    model: str = "resnet50"
    weights: str = "none"
    method: str = "grad-cam"
    precision: str = "fp32"
    batch_size: int | None = None
    device: str = "cpu"  # cpu | cuda
    rounds: int = 5
    seconds: float = 6.0  # of each side in each round, about; half of it with the no-op method
    stored_images: int = 512  # at most, whose bytes are counted
    few_shards: int = 10  # memory: few against many
    many_shards: int = 200
    done_shards: int = 100_000  # resume
    loop_shards: int = 5_000  # of the driver's loop, each round

    @property
    def batch(self) -> int:
        return self.batch_size or BATCH_SIZE[self.device]

    def request(self) -> ExtractRequest:
        """The run that is measured."""
        return ExtractRequest(
            shards=self.shards,
            model=self.model,
            method=self.method,
            weights=self.weights,
            precision=self.precision,
            target="top1",
            batch_size=self.batch,
        )

    def noop(self) -> ExtractRequest:
        """The same on a model and a method that do next to nothing."""
        return ExtractRequest(
            shards=self.shards,
            model="saltern.pipeline.bench.noop:net",
            method="saltern.pipeline.bench.noop:Noop",
            target="top1",
            batch_size=self.batch,
        )


def layouts(device: str, bound: str) -> list[Layout]:
    """One core left to the rest of the pipeline, and all cores to what it waits for.

    Args:
        device: cpu | cuda; a GPU needs no cores.
        bound: model | decode, what the run waits for.
    """
    every = cores()
    threads = min(16, every)
    if device == "cuda" and bound == "model":
        return [Layout("GPU", 1, threads)]
    if bound == "model":
        shared = Layout(f"torch on {every} of {every} cores", every, threads)
        spared = Layout(f"torch on {every - 1} of {every} cores", every - 1, 1)
    else:
        shared = Layout(f"decode threads: {every} on {every} cores", 1, every)
        spared = Layout(f"decode threads: {every - 1} on {every} cores", 1, every - 1)
    return [spared, shared] if every > 1 else [shared]
