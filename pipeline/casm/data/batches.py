"""Training batches: the number of a step determines its batch, so that any step is read without those before it.

An index says where each image is in its tar. All passes over the samples form one endless row; each pass has another
seeded order. Step s takes the s-th batch of the row, and the random crop of an image follows from its place in the
row. So a resumed training repeats nothing, and any number of ranks can share a batch.

Shape suffixes: N samples, B batch, H W the network's input.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import contextlib
import math
import random
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import fs
from torch import Tensor

from saltern.pipeline.casm.data.index import Index
from saltern.pipeline.shards.decode import INTERPOLATIONS, DecodeError, decode_image
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.errors import ShardError

AHEAD = 2  # batches decoded before they are needed
# As torchvision's RandomResizedCrop:
MIN_CROP = 0.08  # least share of the image that a crop covers
RATIO = (3 / 4, 4 / 3)  # of its width to its height
_TRIES = 10  # crops drawn before the centre is taken
_DAMAGED_IN_A_ROW = 20


class Batch(NamedTuple):
    """The share of a batch that one rank has, on the host."""

    pixels_BHWC: Tensor  # uint8, RGB, cropped; half of them mirrored
    label_B: Tensor  # int64, positions among the classes in play
    damaged: int  # images that could not be decoded; the next image in the index that can be decoded replaces each


@dataclass(frozen=True)
class Batches:
    """All batches of a training.

    Args:
        batch_size: of all ranks together; a multiple of world.
        side: of the network's input, pixels.
        min_crop: least share of the image that a random crop covers, in (0, 1].
    """

    index: Index
    batch_size: int
    side: int
    interpolation: str = "bilinear"
    min_crop: float = MIN_CROP
    seed: int = 0
    threads: int = 1
    rank: int = 0
    world: int = 1

    def run(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps start..stop - 1, decoded ahead in threads. Close it to end the threads."""

        def decoded() -> Iterator[Batch]:
            with ThreadPoolExecutor(self.threads, "saltern-decode") as pool:
                for step in range(start, stop):
                    yield self._collate(list(pool.map(self._sample, self._places(step))))

        with contextlib.closing(prefetch(decoded, AHEAD)) as batches:
            yield from batches

    def read(self, step: int) -> Batch:
        """Return the batch of one step."""
        return self._collate([self._sample(place) for place in self._places(step)])

    def _places(self, step: int) -> range:
        """Return the places of this rank's images in the row of all passes."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        return range(first, first + share)

    def _sample(self, place: int) -> tuple[NDArray[np.uint8], int, int]:
        """Return pixels, class, and the number of damaged images that were skipped."""
        each_pass, within = divmod(place, len(self.index))
        number = int(_order(len(self.index), self.seed, each_pass)[within])
        draw = random.Random(f"casm {self.seed} {place} crop")
        for damaged in range(_DAMAGED_IN_A_ROW):
            with contextlib.suppress(DecodeError):
                image = decode_image(self._bytes(number))
                return (
                    crop(image, self.side, self.interpolation, draw, self.min_crop),
                    int(self.index.label_N[number]),
                    damaged,
                )
            number = (number + 1) % len(self.index)
        shard = self.index.shards[self.index.shard_N[number]]
        raise ShardError(f"{shard.url}: {_DAMAGED_IN_A_ROW} images in a row cannot be decoded; see `saltern extract`")

    def _bytes(self, number: int) -> bytes:
        shard = self.index.shards[self.index.shard_N[number]]
        store, path = filesystem(shard.url)
        size = int(self.index.size_N[number])
        info = store.get_file_info(path) if isinstance(store, fs.LocalFileSystem) else None
        if info is not None and not shard.unchanged(info.size, info.mtime_ns):
            raise ShardError(f"{shard.url}: it changed since the training began; restore it, then use --resume")
        with store.open_input_file(path) as raw:
            raw.seek(int(self.index.offset_N[number]))
            data: bytes = raw.read(size)
        if len(data) < size:
            raise ShardError(f"{shard.url}: it is shorter than when the training began; restore it, then use --resume")
        return data

    @staticmethod
    def _collate(samples: list[tuple[NDArray[np.uint8], int, int]]) -> Batch:
        pixels_BHWC = torch.from_numpy(np.stack([pixels for pixels, _, _ in samples]))
        label_B = torch.tensor([label for _, label, _ in samples])
        return Batch(pixels_BHWC, label_B, sum(damaged for _, _, damaged in samples))


@lru_cache(maxsize=2)  # a batch may reach from one pass into the next
def _order(count: int, seed: int, each_pass: int) -> NDArray[np.int64]:
    bits = random.Random(f"casm {seed} {each_pass} order").getrandbits(64)
    return np.random.default_rng(bits).permutation(count)


def crop(
    image: Any, side: int, interpolation: str, draw: random.Random, min_crop: float = MIN_CROP
) -> NDArray[np.uint8]:
    """Return a random crop, (side, side, 3), mirrored in half of all cases.

    The same distribution as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Args:
        image: a Pillow image, RGB.
        interpolation: bilinear | bicubic, antialiased.
    """
    left, top, width, height = crop_box(image.width, image.height, draw, min_crop)
    cut = image.crop((left, top, left + width, top + height))
    pixels_HWC = np.array(cut.resize((side, side), INTERPOLATIONS[interpolation]))
    return np.ascontiguousarray(pixels_HWC[:, ::-1]) if draw.random() < 0.5 else pixels_HWC


def crop_box(width: int, height: int, draw: random.Random, min_crop: float = MIN_CROP) -> tuple[int, int, int, int]:
    """Draw a crop of uniform area and log-uniform ratio, as torchvision does; return left, top, width and height.

    Args:
        min_crop: least share of the area.
    """
    for _ in range(_TRIES):
        area = width * height * draw.uniform(min_crop, 1.0)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return draw.randint(0, width - wide), draw.randint(0, height - high), wide, high
    wide = min(width, max(1, round(height * RATIO[1])))
    high = min(height, max(1, round(width / RATIO[0])))
    return (width - wide) // 2, (height - high) // 2, wide, high
