"""Training batches: the number of a step determines its batch, so that any step is read without those before it.

An index says where each image is in its tar. All passes over the samples form one endless row; each pass has another
seeded order. Step s takes the s-th batch of the row, and the random crop of an image follows from its place in the
row. So a resumed training repeats nothing, and any number of ranks can share a batch.

A decoder of a GPU gets whole batches, and cuts and mirrors there; one of a CPU gets one image at a time, in threads.

Shape suffixes: N samples, B batch, H W the network's input.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import contextlib
import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import fs
from torch import Tensor

from saltern.pipeline.shards.decode import Region
from saltern.pipeline.shards.decoder import CpuDecoder, Decoder
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.storage.filesystem import filesystem
from saltern.pipeline.training.index import Index
from saltern.schemas.errors import ShardError

AHEAD = 2  # batches decoded before they are needed
# As torchvision's RandomResizedCrop:
MIN_CROP = 0.08  # least share of the image that a crop covers
RATIO = (3 / 4, 4 / 3)  # of its width to its height
_TRIES = 10  # crops drawn before the centre is taken
_DAMAGED_IN_A_ROW = 20
_Map = Callable[..., Iterable[Any]]  # `map`, or that of a pool of threads


class Batch(NamedTuple):
    """The share of a batch that one rank has."""

    pixels_BHWC: Tensor  # uint8, RGB, cropped, half of them mirrored; on the decoder's device
    label_B: Tensor  # int64, `label_N` of the index; on the host
    crop_B4: Tensor  # float32, scale x, scale y, offset x, offset y from input pixels to the original; on the host
    damaged: int  # images that could not be decoded; the next image in the index that can be decoded replaces each


@dataclass(frozen=True)
class Batches:
    """All batches of a training.

    Args:
        batch_size: of all ranks together; a multiple of world.
        decoder: its preprocess has the side of the network's input and the interpolation.
        min_crop: least share of the image that a random crop covers, in (0, 1].
        threads: that read; with a decoder of a CPU they decode too.
    """

    index: Index
    batch_size: int
    decoder: Decoder
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
                    yield self._batch(step, pool.map)

        with contextlib.closing(prefetch(decoded, AHEAD)) as batches:
            yield from batches

    def read(self, step: int) -> Batch:
        """Return the batch of one step."""
        return self._batch(step, map)

    def _batch(self, step: int, each: _Map) -> Batch:
        places = self._places(step)
        if not isinstance(self.decoder, CpuDecoder):
            return self._samples(places, each)
        parts = each(self._samples, ([place] for place in places))
        pixels, labels, crops, damaged = zip(*parts, strict=True)
        return Batch(torch.cat(pixels), torch.cat(labels), torch.cat(crops), sum(damaged))

    def _places(self, step: int) -> range:
        """Return the places of this rank's images in the row of all passes."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        return range(first, first + share)

    def _samples(self, places: Sequence[int], each: _Map = map) -> Batch:
        """Return the samples of some places. The next image in the index replaces one that cannot be decoded."""
        numbers = [self._number(place) for place in places]
        cuts = [partial(random_cut, f"casm {self.seed} {place} crop", self.min_crop) for place in places]
        pixels_BHWC, waiting, damaged = None, list(range(len(places))), 0
        crop_B4 = np.zeros((len(places), 4), np.float32)
        for _ in range(_DAMAGED_IN_A_ROW):
            images = list(each(self._bytes, [numbers[position] for position in waiting]))
            decoded = self.decoder(images, [cuts[position] for position in waiting])
            own(decoded.pixels_BHWC)
            crop_B4[waiting] = decoded.geometry_B4
            if pixels_BHWC is None:
                pixels_BHWC = decoded.pixels_BHWC
            else:
                for slot, position in enumerate(waiting):
                    pixels_BHWC[position] = decoded.pixels_BHWC[slot]
            waiting = [waiting[slot] for slot in sorted(decoded.problems)]
            if not waiting:
                label_B = torch.from_numpy(self.index.label_N[numbers])
                return Batch(pixels_BHWC, label_B, torch.from_numpy(crop_B4), damaged)
            damaged += len(waiting)
            for position in waiting:
                numbers[position] = (numbers[position] + 1) % len(self.index)
        shard = self.index.shards[self.index.shard_N[numbers[waiting[0]]]]
        raise ShardError(f"{shard.url}: {_DAMAGED_IN_A_ROW} images in a row cannot be decoded; see `saltern extract`")

    def _number(self, place: int) -> int:
        each_pass, within = divmod(place, len(self.index))
        return int(_order(len(self.index), self.seed, each_pass)[within])

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


@lru_cache(maxsize=2)  # a batch may reach from one pass into the next
def _order(count: int, seed: int, each_pass: int) -> NDArray[np.int64]:
    bits = random.Random(f"casm {seed} {each_pass} order").getrandbits(64)
    return np.random.default_rng(bits).permutation(count)


def own(pixels_BHWC: Tensor) -> None:
    """Keep the memory of pixels from a GPU decoder's stream until this thread's stream has used them."""
    if pixels_BHWC.is_cuda:
        pixels_BHWC.record_stream(torch.cuda.current_stream(pixels_BHWC.device))


def random_cut(seed: str, min_crop: float, width: int, height: int) -> Region:
    """Return a random crop of an image, mirrored in half of all cases. It depends only on the arguments.

    The same distribution as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Args:
        seed: of the draw.
        min_crop: least share of the image's area.
    """
    draw = random.Random(seed)
    left, top, wide, high = crop_box(width, height, draw, min_crop)
    start, end = (wide, 0) if draw.random() < 0.5 else (0, wide)
    return (left, top, left + wide, top + high), (start, 0, end, high)


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
