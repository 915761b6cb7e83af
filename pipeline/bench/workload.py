"""The workload of `saltern bench extract`: options, shards, a model and a method that cost almost nothing, drives.

Shape suffixes: B batch, C H W an image's channels and pixels, K classes, h w the grid of a map.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from webdataset.writer import TarWriter

from saltern.pipeline.engine.driver import Driver
from saltern.pipeline.engine.pool import Pool
from saltern.pipeline.extract.request import BATCH_SIZE, ExtractRequest, resolve
from saltern.pipeline.methods import Method
from saltern.pipeline.methods.base import Maps
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys
from saltern.pipeline.storage.store import Store, session
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import Failure, Receipt
from saltern.schemas.run import Shard

CLASSES = 1000


@dataclass(frozen=True)
class ExtractBench:
    """Options of the measurement. The defaults take about nine minutes on two cores."""

    command: Sequence[str]  # that runs `saltern`
    shards: Sequence[str] = ()  # as `extract` takes them; none: shards of made pictures
    made: bool = False  # the shards hold made pictures
    model: str = "resnet50"
    weights: str = "none"
    method: str = "grad-cam"
    precision: str = "fp32"
    batch_size: int | None = None
    device: str = "cpu"  # cpu | cuda
    rounds: int = 5
    seconds: float = 6.0  # of each side in each round; half of it with the no-op method
    stored_images: int = 512  # whose bytes are counted
    few_shards: int = 10  # of the memory figure
    many_shards: int = 200
    done_shards: int = 100_000  # of the resume figure
    loop_shards: int = 5_000  # of the driver's loop

    @property
    def batch(self) -> int:
        return self.batch_size or BATCH_SIZE[self.device]

    def request(self) -> ExtractRequest:
        """Return the run that is measured."""
        return replace(
            self.noop(), model=self.model, method=self.method, weights=self.weights, precision=self.precision
        )

    def noop(self) -> ExtractRequest:
        """Return the same run with a model and a method that cost almost nothing."""
        return ExtractRequest(
            shards=self.shards, model=f"{__name__}:Net", method=f"{__name__}:Noop", target="top1", batch_size=self.batch
        )


class Net(nn.Module):
    """Model whose logits depend only on the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(x_BCHW.mean((2, 3)))
        return logits_BK


class Noop(Method):
    """Method that returns the same smooth 7 x 7 map for every image, without a forward pass."""

    def prepare(self) -> None:
        row_7 = torch.linspace(-1, 1, 7)
        self._map_hw = 2 - row_7[:, None] ** 2 - row_7[None, :] ** 2

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        self._map_hw = self._map_hw.to(x_BCHW.device)
        logits_BK = x_BCHW.new_zeros(len(x_BCHW), CLASSES)
        return self._map_hw.expand(len(x_BCHW), 7, 7), logits_BK, logits_BK.argmax(1) if target_B is None else target_B


def make_shards(folder: Path, shards: int, each: int, height: int = 375, width: int = 500) -> None:
    """Write shards of JPEGs that cost as much as ImageNet's, about 110 kB: crops of noise with a 1/f spectrum."""
    rng = np.random.default_rng(0)
    scene_HWC = _scene(rng, 2 * height, 2 * width)
    folder.mkdir(parents=True)
    for shard in range(shards):
        with TarWriter(str(folder / f"shard-{shard:06}.tar"), encoder=False, mtime=0) as tar:
            for number in range(shard * each, (shard + 1) * each):
                y, x = rng.integers(height), rng.integers(width)
                stream = io.BytesIO()
                Image.fromarray(scene_HWC[y : y + height, x : x + width]).save(stream, "JPEG", quality=92)
                tar.write({"__key__": f"{number:08}", "jpg": stream.getvalue(), "cls": str(number % CLASSES).encode()})


def _scene(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency_HW[0, 0] = np.inf
    # Channels of a photograph are much alike: a shared plane, and a third as much of a plane for each channel.
    shared_HW, *planes = [
        np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / frequency_HW).real for _ in range(4)
    ]
    mixed_HWC = np.stack([shared_HW + plane_HW / 3 for plane_HW in planes], 2)
    bytes_HWC: NDArray[np.uint8] = (128 + 50 * mixed_HWC / mixed_HWC.std()).clip(0, 255).astype(np.uint8)
    return bytes_HWC


@dataclass(frozen=True)
class Supply:
    """Any number of images, from shards that are read again and again."""

    shards: list[Shard]
    samples: list[int]  # of each shard

    @classmethod
    def of(cls, patterns: Sequence[str]) -> "Supply":
        """Return the supply of the shards that match. Raises UserError if they hold no samples."""
        shards, _ = expand(patterns)
        samples = [len(list_keys(shard)) for shard in shards]
        if not any(samples):
            raise UserError("the shards to measure on hold no samples")
        return cls(shards, samples)

    def images(self, count: float, each: int | None = None) -> list[Shard]:
        """Return shards that hold `count` images, at most `each` a shard, all with different names."""
        left, taken = max(1, round(count)), list[Shard]()
        for shard, samples in cycle(zip(self.shards, self.samples, strict=True)):
            take = min(left, samples, each or samples)
            taken.append(replace(shard, name=f"{len(taken):06}", take=take))
            left -= take
            if not left:
                break
        return taken


@contextmanager
def spec_for(request: ExtractRequest, device: str, torch_threads: int, decode_threads: int) -> Iterator[Spec]:
    """Yield a processor's spec for a run in a temporary folder."""
    run, _ = resolve(replace(request, torch_threads=torch_threads), None, device, 1)
    with TemporaryDirectory(prefix="saltern-bench-") as root, session(Store(root)) as scratch:
        yield Spec(run, root, str(scratch), device, decode_threads)


class NullBook:
    """A book that knows no results and records none."""

    def receipt_of(self, shard: Shard) -> Receipt | None:
        return None

    def succeeded(self, receipt: Receipt) -> None: ...

    def failed(self, failure: Failure) -> None: ...


def drive(pool: Pool, shards: Sequence[Shard], workers: int = 1) -> list[Receipt]:
    """Drive shards through a pool. Raises UserError if one fails."""
    outcome = Driver(pool, NullBook(), workers=workers).run(shards)
    for failure in outcome.failures.values():
        raise UserError(f"cannot measure on {failure.shard}: {failure.reason}")
    return list(outcome.receipts.values())


def images(receipts: Sequence[Receipt]) -> int:
    """Return the images of the receipts' shards."""
    return sum(receipt.samples for receipt in receipts)
