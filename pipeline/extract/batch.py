"""Batches of samples as columns: read and decoded in pieces, then cut to the size that the task gets.

Shape suffixes: D decoded samples, H W C an image's pixels and channels.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.shards.decoder import DecodedBatch, Decoder
from saltern.pipeline.shards.sources import Data

Problem = tuple[str, str]  # status, reason


@dataclass
class Batch:
    """Consecutive samples of a shard, those with an image decoded."""

    keys: list[str]
    indices: list[int]  # in the shard
    labels: list[int | None]
    problems: dict[int, Problem]  # by position in the batch
    kept: dict[int, pa.RecordBatch]  # rows of an earlier run, by position
    decoded: list[int]  # positions, in order; the columns below have a row for each
    pixels_DHWC: Tensor | None  # noqa: N815 - uint8; None: no sample is decoded, or the task has them
    size_D2: NDArray[np.int32]  # noqa: N815 - height and width of the upright originals, pixels
    geometry_D4: NDArray[np.float64]  # noqa: N815 - see saltern.schemas.saliency

    def __len__(self) -> int:
        return len(self.keys)

    def end(self, start: int, room: int, longest: int) -> int:
        """Return the end of the part that begins at `start`, with `room` decoded samples or `longest` in all."""
        stop, last = min(start + longest, len(self)), bisect_left(self.decoded, start) + room
        return min(stop, self.decoded[last - 1] + 1) if last <= len(self.decoded) else stop

    def part(self, start: int, stop: int) -> "Batch":
        """Return the samples from start to stop."""
        if (start, stop) == (0, len(self)):
            return self
        first, last = bisect_left(self.decoded, start), bisect_left(self.decoded, stop)
        return Batch(
            self.keys[start:stop],
            self.indices[start:stop],
            self.labels[start:stop],
            {at - start: problem for at, problem in self.problems.items() if start <= at < stop},
            {at - start: rows for at, rows in self.kept.items() if start <= at < stop},
            [at - start for at in self.decoded[first:last]],
            None if self.pixels_DHWC is None or first == last else self.pixels_DHWC[first:last],
            self.size_D2[first:last],
            self.geometry_D4[first:last],
        )

    def refuse(self, slots: Sequence[int], problem: Problem) -> None:
        """Give decoded samples a problem; `slots` are their numbers among the decoded."""
        self.problems |= {self.decoded[slot]: problem for slot in slots}
        others = sorted(set(range(len(self.decoded))) - set(slots))
        self.decoded = [self.decoded[slot] for slot in others]
        self.size_D2, self.geometry_D4 = self.size_D2[others], self.geometry_D4[others]


def join(parts: Sequence[Batch], *, pixels: bool = True) -> Batch:
    """Join parts of a batch; there is at least one.

    Args:
        pixels: False leaves them out; another batch with the same decoded samples has them.
    """
    if len(parts) == 1:
        return parts[0] if pixels else replace(parts[0], pixels_DHWC=None)
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    numbered = list(zip(starts, parts, strict=False))
    return Batch(
        list(chain.from_iterable(part.keys for part in parts)),
        list(chain.from_iterable(part.indices for part in parts)),
        list(chain.from_iterable(part.labels for part in parts)),
        {start + at: problem for start, part in numbered for at, problem in part.problems.items()},
        {start + at: rows for start, part in numbered for at, rows in part.kept.items()},
        [start + at for start, part in numbered for at in part.decoded],
        _together([part.pixels_DHWC for part in parts if pixels and part.pixels_DHWC is not None]),
        np.concatenate([part.size_D2 for part in parts]),
        np.concatenate([part.geometry_D4 for part in parts]),
    )


def _together(pixels: Sequence[Tensor]) -> Tensor | None:
    if len(pixels) < 2:
        return next(iter(pixels), None)
    if pixels[0].device.type != "cpu":
        return torch.cat(list(pixels))
    # torch would start threads for the copy, which compete with the method's.
    return torch.from_numpy(np.concatenate([part.numpy() for part in pixels]))


class Cutter:
    """Cuts the samples of pieces into batches that end at `size` decoded samples, or at `longest` in all."""

    def __init__(self, size: int, longest: int) -> None:
        self._size, self._longest = size, longest
        self._parts: list[Batch] = []
        self._decoded = self._length = 0

    def add(self, piece: Batch) -> Iterator[list[Batch]]:
        """Add a piece. Yields the parts of each batch that ends in it."""
        start = 0
        while start < len(piece):
            stop = piece.end(start, self._size - self._decoded, self._longest - self._length)
            self._parts.append(piece.part(start, stop))
            self._decoded += len(self._parts[-1].decoded)
            self._length, start = self._length + stop - start, stop
            if self._decoded == self._size or self._length == self._longest:
                yield from self.rest()

    def rest(self) -> Iterator[list[Batch]]:
        """Yield the parts of the last batch, if there are any."""
        if self._parts:
            yield self._parts
        self._parts, self._decoded, self._length = [], 0, 0


Lot = dict[str, Batch]  # batches of runs with the same decoded samples, by the run's name; the first has the pixels


def lots(cut: Mapping[str, Iterable[list[Batch]]]) -> list[Lot]:
    """Join the parts of batches that runs have cut from the same pieces, and put batches of the same samples together.

    Returns:
        The lots; those of a run follow each other as its batches do.
    """
    if len(cut) == 1:
        return [{name: join(parts)} for name, batches in cut.items() for parts in batches]
    found: dict[tuple[object, ...], tuple[int, Lot]] = {}
    for name, batches in cut.items():
        for parts in batches:
            decoded = tuple(part.indices[at] for part in parts for at in part.decoded)
            last = parts[-1].indices[-1]
            _, lot = found.setdefault(decoded or (name, last), (decoded[-1] if decoded else last, {}))
            lot[name] = join(parts, pixels=not lot)
    return [lot for _, lot in sorted(found.values(), key=lambda each: each[0])]


@dataclass
class View:
    """The samples of a piece that one run does not take, by position."""

    problems: dict[int, Problem] = field(default_factory=dict)
    kept: dict[int, pa.RecordBatch] = field(default_factory=dict)

    def batch(self, piece: "Piece", made: DecodedBatch | None) -> Batch:
        """Return the samples of a piece; `made` are its decoded images."""
        columns = piece.keys, piece.indices, piece.labels
        if made is None:
            return Batch(*columns, self.problems, self.kept, [], None, np.zeros((0, 2), np.int32), np.zeros((0, 4)))
        taken = [slot for slot, at in enumerate(piece.slots) if at not in self.problems and at not in self.kept]
        bad = {piece.slots[slot]: made.problems[slot] for slot in taken if slot in made.problems}
        good = [slot for slot in taken if slot not in made.problems] if bad else taken
        whole = len(good) == len(piece.slots)
        pixels = made.pixels_BHWC if whole else made.pixels_BHWC[good] if good else None
        sizes = (made.size_B2, made.geometry_B4) if whole else (made.size_B2[good], made.geometry_B4[good])
        return Batch(*columns, self.problems | bad, self.kept, [piece.slots[slot] for slot in good], pixels, *sizes)


@dataclass
class Piece:
    """Consecutive samples of a shard, as they are read."""

    views: list[View] = field(default_factory=lambda: [View()])  # one for each run
    keys: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # positions of the samples with an image
    images: list[Data] = field(default_factory=list)  # emptied when they are decoded
    size: int = 0  # bytes of the images, also when they are decoded
    _decoding: Future[tuple[DecodedBatch, float]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, index: int, label: int | None, image: Data | None = None) -> int:
        """Add a sample, and return its position. `image` is None if no run takes it."""
        position = len(self.keys)
        self.keys.append(key)
        self.indices.append(index)
        self.labels.append(label)
        if image is not None:
            self.slots.append(position)
            self.images.append(image)
            self.size += len(image)
        return position

    def start(self, pool: ThreadPoolExecutor, decoder: Decoder) -> "Piece":
        """Start to decode the images. The piece gets no more samples."""
        if self.images:
            self._decoding = pool.submit(_decode, decoder, self.images)
        return self

    def wait(self) -> tuple[list[Batch], float]:
        """Return the decoded samples as each view has them, and the seconds that the decoding took."""
        made, seconds = (None, 0.0) if self._decoding is None else self._decoding.result()
        self._decoding = None
        if made is not None and made.pixels_BHWC.device.type == "cuda":
            made.pixels_BHWC.record_stream(torch.cuda.current_stream())
        return [view.batch(self, made) for view in self.views], seconds


def _decode(decoder: Decoder, images: list[Data]) -> tuple[DecodedBatch, float]:
    """Return the decoded images and the seconds. The files' bytes are not needed any more."""
    since = time.perf_counter()
    try:
        made = decoder(images)
    finally:
        images.clear()
    return made, time.perf_counter() - since
