"""The options of `bench extract`, the images that it works on, and a model and a method that cost almost nothing.

Shape suffixes: B batch, C H W an image's channels and pixels, K classes, h w the grid of a map.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from webdataset.writer import TarWriter

from saltern.pipeline.extract.request import BATCH_SIZE
from saltern.pipeline.methods import Method
from saltern.pipeline.methods.base import Maps
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import UserError

CLASSES = 1000
NOOP: dict[str, Any] = {"model": f"{__name__}:Net", "method": f"{__name__}:Noop"}


@dataclass(frozen=True)
class ExtractBench:
    """Options of the measurement."""

    command: Sequence[str]  # that runs `saltern`
    shards: Sequence[str] = ()  # as `extract` takes them; none: made pictures
    model: str = "resnet50"
    weights: str = "none"
    method: str = "grad-cam"
    precision: str = "fp32"
    batch_size: int | None = None
    device: str = "cpu"  # cpu | cuda
    rounds: int = 5
    images: int = 512  # different ones; their bytes are counted
    batches: int = 14  # of a run on a CPU, each a shard
    large_shards: int = 24  # of a run with the no-op method or on a GPU, of 8 batches each
    few_shards: int = 10  # of the memory figure
    many_shards: int = 200
    done_shards: int = 100_000  # of the resume figure
    loop_shards: int = 5_000  # of the driver's loop

    @property
    def batch(self) -> int:
        return self.batch_size or BATCH_SIZE[self.device]

    def extract(self, shards: Path, noop: bool = False, **options: object) -> list[str]:
        """Return the command of a run, except --out; with `noop`, its model and method cost almost nothing."""
        fixed = {"target": "top1", "device": self.device, "batch_size": self.batch, "engine": "local"}
        names = ("model", "method", "weights", "precision")
        kind: Mapping[str, object] = NOOP if noop else {name: getattr(self, name) for name in names}
        return [*self.command, "extract", str(shards), *option_words({**fixed, **kind, **options})]


class Net(nn.Module):
    """Model whose logits depend only on the mean colour. Its one layer with a grid averages patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.AvgPool2d(32)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(self.patches(x_BCHW).mean((2, 3)))
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


def option_words(options: Mapping[str, object]) -> list[str]:
    """Return `--name value` words."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def read_images(patterns: Sequence[str], count: int) -> list[bytes]:
    """Return the first encoded images of the shards that match. Raises UserError if they hold no samples."""
    samples = (sample for shard in expand(patterns)[0] for sample in read_samples(shard))
    images = list(islice((sample.image for sample in samples if sample.image is not None), count))
    if not images:
        raise UserError("the shards to measure on hold no samples")
    return images


def make_images(count: int, height: int = 375, width: int = 500) -> list[bytes]:
    """Return JPEGs that cost as much as ImageNet's, about 110 kB: crops of noise with a 1/f spectrum."""
    rng = np.random.default_rng(0)
    frequency_HW = np.hypot(np.fft.fftfreq(2 * height)[:, None], np.fft.fftfreq(2 * width)[None])
    frequency_HW[0, 0] = np.inf
    noise_4HW = rng.standard_normal((4, 2 * height, 2 * width))
    shared_HW, *planes = np.fft.ifft2(np.fft.fft2(noise_4HW) / frequency_HW).real
    # Channels of a photograph are much alike: a shared plane, and a third as much of a plane for each channel.
    mixed_HWC = np.stack([shared_HW + plane_HW / 3 for plane_HW in planes], 2)
    scene_HWC = (128 + 50 * mixed_HWC / mixed_HWC.std()).clip(0, 255).astype(np.uint8)
    images = []
    for _ in range(count):
        y, x = rng.integers(height), rng.integers(width)
        stream = io.BytesIO()
        Image.fromarray(scene_HWC[y : y + height, x : x + width]).save(stream, "JPEG", quality=92)
        images.append(stream.getvalue())
    return images


def write_shards(folder: Path, images: Sequence[bytes], shards: int, each: int, classes: int = CLASSES) -> Path:
    """Write shards of `each` images, which are repeated as often as needed. Returns the folder."""
    folder.mkdir(parents=True)
    samples = enumerate(cycle(images))
    for shard in range(shards):
        with TarWriter(str(folder / f"shard-{shard:06}.tar"), encoder=False, mtime=0) as tar:
            for number, image in islice(samples, each):
                tar.write({"__key__": f"{number:08}", "jpg": image, "cls": str(number % classes).encode()})
    return folder
