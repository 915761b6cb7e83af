"""A torch dataset of images with their maps and masks: a run joined with its shards."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info

from saltern.pipeline.maps.discretize import largest_box
from saltern.pipeline.runs.mixing import SAMPLES, mix, shards_at_once, shares_after
from saltern.pipeline.runs.reader import Row, open_run
from saltern.pipeline.runs.writer import ROW_GROUP
from saltern.pipeline.shards.decode import DecodeError, decode
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK

_WORKERS = 1024  # of a loader, at most

Entry = tuple[bytes, Row]  # an image file and one of its rows


class SaliencyDataset(IterableDataset[Any]):
    """Streams a run with its images: each (sample, target) once over all ranks and loader workers.

    Whole shards go to ranks, and from a rank to its workers: have at least ranks * workers shards. Ranks may differ in
    length, so the dataset has no `len`; end an epoch after a fixed number of steps. The dataset has the shards that
    were done when it was made; ranks see the same ones only if nothing writes to the run meanwhile.

    With `shuffle`, each pass has another order, which follows from (seed, epoch). It shuffles the shards, reads 16 at
    once in each worker (fewer if their maps take more than 512 MiB), and takes rows from a buffer of undecoded samples
    at random. The buffer has `buffer` samples, at most 128 MiB. The epoch counts the passes; `set_epoch` sets it, and
    resumes within one.

    An item is ready for the default collate (H W: the network's input; image, map and mask align pixel for pixel):

    - image: uint8 (3, H, W), RGB, preprocessed as in the run, not normalised: see `mean` and `std`
    - map: float32 (H, W), in its own unit; absent if the run was made with --no-map
    - mask: bool (H, W)
    - box: int64 (4,), x0 y0 x1 y1, half-open, of the mask's largest component in pixels of the *original*; zeros, and
      `has_box` False, if the mask is empty
    - box_input: int64 (4,), the same in pixels of image, map and mask
    - geometry: float32 (4,), from input pixels to the original (schemas.saliency); image_size: int64 (2,), height and
      width of the original
    - label, predicted, target: int, -1 if absent; score: float, NaN if absent
    - key, shard, status: str; index: int

    With `only_ok` False, the missing values of a failed row are zeros.

    Args:
        path: folder or object store's URL of the run. For a URL, give the DataLoader
            multiprocessing_context="spawn": object-store clients do not survive a fork.
        only_ok: skip rows whose status is not ok.
        shuffle: shuffle the rows; otherwise they come in the order of the run.
        seed: of the order.
        buffer: samples that wait in each worker's buffer.
        transform: called with each item, in the worker; the dataset yields what it returns.
        shards: where the run's tars are now, if they were moved: paths, URLs, globs or folders.
        rank, world: of this process; by default those of torch.distributed, if it is initialised.

    Attributes:
        mean, std: float32 (3, 1, 1), of RGB in [0, 1]: (image / 255 - mean) / std is the network's input.

    Raises:
        UserError: the path has no run, a tar is not one of the run, or the rank is not in 0..world-1.
        ShardError: while iterating, if a tar no longer matches its data file.
    """

    def __init__(
        self,
        path: str,
        *,
        only_ok: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = SAMPLES,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        shards: Sequence[str] = (),
        rank: int | None = None,
        world: int | None = None,
    ):
        together = distributed.is_available() and distributed.is_initialized()
        self._rank = rank if rank is not None else distributed.get_rank() if together else 0
        self._world = world if world is not None else distributed.get_world_size() if together else 1
        if not 0 <= self._rank < self._world:
            raise UserError(f"rank {self._rank} of {self._world}: ranks count from 0")
        self._run = open_run(path, shards)
        self._config = self._run.config
        self._only_ok, self._shuffle, self._seed, self._transform = only_ok, shuffle, seed, transform
        self._buffer = max(1, buffer)
        preprocess = self._config.preprocess
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
        done = zip(self._run.shards, self._run.receipts, strict=True)
        self._rows = {shard.name: receipt.statuses.get(OK, 0) if only_ok else receipt.rows for shard, receipt in done}
        groups = (it.data_bytes * min(it.rows, ROW_GROUP) // max(1, it.rows) for it in self._run.receipts)
        self._open = shards_at_once(max(groups, default=0)) if shuffle else 1
        # Shared, so that persistent workers see the next epoch: epoch, batches, batch size, drop_last.
        self._place = torch.tensor([0, 0, 1, 0]).share_memory_()  # type: ignore[no-untyped-call]
        self._passes = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int, *, batches: int = 0, batch_size: int = 1, drop_last: bool = False) -> None:
        """Set the epoch of the next pass, which seeds its order; call it with the same number on all ranks.

        Each pass is the epoch after the last one, so calling this is needed only to resume, or to repeat an order.

        Args:
            batches: leave out this many batches, which this rank took in the epoch before it was stopped. Samples of
                at most 16 shards are read again, undecoded. The loader must have as many workers as before.
            batch_size, drop_last: of that loader.
        """
        self._place.copy_(torch.tensor([epoch, batches, batch_size, int(drop_last)]))
        self._passes.zero_()

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        first, batches, batch_size, drop_last = self._place.tolist()
        passes = int(self._passes[worker])
        self._passes[worker] += 1
        shards = list(self._run.shards)
        if self._shuffle:
            random.Random(f"{self._seed} {first + passes}").shuffle(shards)
        shards = shards[self._rank :: self._world]
        lengths = [sum(self._rows[shard.name] for shard in shards[number::workers]) for number in range(workers)]
        share, skip = shares_after(0 if passes else batches, batch_size, bool(drop_last), lengths)[worker]
        return self._items(shards[share::workers], skip, first + passes)

    def _items(self, shards: Sequence[Shard], skip: int, epoch: int) -> Iterator[Any]:
        """Yield the items of some shards, without the first `skip`."""
        for start in range(0, len(shards), self._open):
            block = shards[start : start + self._open]
            rows = [self._rows[shard.name] for shard in block]
            if skip >= sum(rows):
                skip -= sum(rows)
                continue
            streams = [self._entries(shard) for shard in block]
            entries: Iterator[Entry] = chain.from_iterable(streams)
            if self._shuffle:
                draw = random.Random(f"{self._seed} {epoch} {block[0].name}")
                entries = mix(streams, rows, draw, _size, self._buffer)
            last, image_3HW = None, torch.empty(0)
            for image, row in islice(entries, skip, None):
                if image is not last:  # the rows of a sample share its image
                    last, image_3HW = image, self._image(image, row)
                item = self._item(image_3HW.clone(), row)
                yield item if self._transform is None else self._transform(item)
            skip = 0

    def _entries(self, shard: Shard) -> Iterator[Entry]:
        for sample, rows in self._run.joined(shard):
            yield from ((sample.image or b"", row) for row in rows if row.status == OK or not self._only_ok)

    def _image(self, image: bytes, row: Row) -> Tensor:
        preprocess = self._config.preprocess
        pixels_HWC: NDArray[np.uint8] = np.zeros((*preprocess.shape, 3), np.uint8)
        try:
            pixels_HWC = decode(image, preprocess).pixels_HWC
        except DecodeError:
            if row.status == OK:  # the run could decode it
                raise
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()

    def _item(self, image_3HW: Tensor, row: Row) -> dict[str, Any]:
        shape = image_3HW.shape[1:]
        mask_HW: NDArray[np.bool_] = np.zeros(tuple(shape), bool) if row.mask_bytes is None else row.mask()
        item = {
            "key": row.key,
            "shard": row.shard,
            "index": row.index,
            "status": row.status,
            "image": image_3HW,
            "mask": torch.from_numpy(mask_HW),
            "box": torch.tensor(row.boxes[0] if row.boxes else [0, 0, 0, 0]),
            "box_input": torch.tensor(largest_box(mask_HW) or [0, 0, 0, 0]),
            "has_box": bool(row.boxes),
            "geometry": torch.tensor(row.geometry or [0.0, 0.0, 0.0, 0.0]),
            "image_size": torch.tensor([row.image_height or 0, row.image_width or 0]),
            "score": float("nan") if row.score is None else row.score,
        }
        for name, value in (("label", row.label), ("predicted", row.predicted), ("target", row.target)):
            item[name] = -1 if value is None else value
        if self._config.save_map:
            item["map"] = torch.zeros(shape) if row.map_bytes is None else torch.from_numpy(row.map("input"))
        return item


def _size(entry: Entry) -> int:
    """Return the bytes that an entry holds in memory."""
    image, row = entry
    return len(image) + len(row.map_bytes or b"") + len(row.mask_bytes or b"")
