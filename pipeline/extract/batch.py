"""Batches of samples as columns: read and decoded in pieces, then cut to the size that the task gets.

Shape suffixes: D decoded samples, H W C an image's pixels and channels.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.shards.decoder import DecodedBatch, Decoder

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


def join(parts: Sequence[Batch]) -> Batch:
    """Join parts of a batch; there is at least one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    numbered = list(zip(starts, parts, strict=False))
    return Batch(
        list(chain.from_iterable(part.keys for part in parts)),
        list(chain.from_iterable(part.indices for part in parts)),
        list(chain.from_iterable(part.labels for part in parts)),
        {start + at: problem for start, part in numbered for at, problem in part.problems.items()},
        {start + at: rows for start, part in numbered for at, rows in part.kept.items()},
        [start + at for start, part in numbered for at in part.decoded],
        _together([part.pixels_DHWC for part in parts if part.pixels_DHWC is not None]),
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


def regroup(pieces: Iterable[Batch], size: int, longest: int) -> Iterator[Batch]:
    """Yield the samples of the pieces in batches that end at `size` decoded samples, or at `longest` in all."""
    parts: list[Batch] = []
    decoded = length = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            stop = piece.end(start, size - decoded, longest - length)
            parts.append(piece.part(start, stop))
            decoded, length, start = decoded + len(parts[-1].decoded), length + stop - start, stop
            if decoded == size or length == longest:
                yield join(parts)
                parts, decoded, length = [], 0, 0
    if parts:
        yield join(parts)


@dataclass
class Piece:
    """Consecutive samples of a shard, as they are read."""

    keys: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    problems: dict[int, Problem] = field(default_factory=dict)
    kept: dict[int, pa.RecordBatch] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)  # positions of the samples with an image
    images: list[bytes] = field(default_factory=list)  # emptied when they are decoded
    size: int = 0  # bytes of the images, also when they are decoded
    _decoding: Future[tuple[DecodedBatch, float]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, index: int, label: int | None, image: bytes | None = None) -> int:
        """Add a sample, and return its position."""
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

    def wait(self) -> tuple[Batch, float]:
        """Return the decoded samples, and the seconds that the decoding took."""
        columns = self.keys, self.indices, self.labels, self.problems, self.kept
        if self._decoding is None:
            return Batch(*columns, [], None, np.zeros((0, 2), np.int32), np.zeros((0, 4))), 0.0
        made, seconds = self._decoding.result()
        self._decoding, pixels = None, made.pixels_BHWC
        if pixels.device.type == "cuda":
            pixels.record_stream(torch.cuda.current_stream())
        if not made.problems:
            return Batch(*columns, self.slots, pixels, made.size_B2, made.geometry_B4), seconds
        self.problems |= {self.slots[slot]: problem for slot, problem in made.problems.items()}
        good = [slot for slot in range(len(self.slots)) if slot not in made.problems]
        decoded = [self.slots[slot] for slot in good]
        return Batch(
            *columns, decoded, pixels[good] if good else None, made.size_B2[good], made.geometry_B4[good]
        ), seconds


def _decode(decoder: Decoder, images: list[bytes]) -> tuple[DecodedBatch, float]:
    """Return the decoded images and the seconds. The files' bytes are not needed any more."""
    since = time.perf_counter()
    try:
        made = decoder(images)
    finally:
        images.clear()
    return made, time.perf_counter() - since
