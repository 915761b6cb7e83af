"""A torch dataset of images with their maps and masks: a run joined with its shards."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info

from saltern.pipeline.runs.reader import Row, open_run
from saltern.pipeline.shards.decode import DecodeError, decode
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK


class SaliencyDataset(IterableDataset[dict[str, Any]]):
    """Streams a run with its images: each (sample, target) once over all ranks and loader workers.

    Whole shards go to ranks, and from a rank to its workers: have at least ranks * workers shards. Ranks may differ in
    length, so the dataset has no `len`; end an epoch after a fixed number of steps. The dataset has the shards that
    were done when it was made; ranks see the same ones only if nothing writes to the run meanwhile.

    An item is ready for the default collate (H W: the network's input; image, map and mask align pixel for pixel):

    - image: uint8 (3, H, W), RGB, preprocessed as in the run, not normalised
    - map: float32 (H, W), in its own unit; absent if the run was made with --no-map
    - mask: bool (H, W)
    - box: int64 (4,), x0 y0 x1 y1, half-open, of the mask's largest component in pixels of the *original*; zeros, and
      `has_box` False, if the mask is empty
    - geometry: float32 (4,), from input pixels to the original (schemas.saliency); image_size: int64 (2,), height and
      width of the original
    - label, predicted, target: int, -1 if absent; score: float, NaN if absent
    - key, shard, status: str; index: int

    With `only_ok` False, the missing values of a failed row are zeros.

    Args:
        path: folder or object store's URL of the run. For a URL, give the DataLoader
            multiprocessing_context="spawn": object-store clients do not survive a fork.
        only_ok: skip rows whose status is not ok.
        shuffle: shuffle the shards by (seed, epoch); rows keep their order within a shard.
        rank, world: of this process; by default those of torch.distributed, if it is initialised.

    Raises:
        UserError: the path has no run, or the rank is not in 0..world-1.
        ShardError: while iterating, if a tar no longer matches its data file.
    """

    def __init__(
        self,
        path: str,
        *,
        only_ok: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ):
        together = distributed.is_available() and distributed.is_initialized()
        self._rank = rank if rank is not None else distributed.get_rank() if together else 0
        self._world = world if world is not None else distributed.get_world_size() if together else 1
        if not 0 <= self._rank < self._world:
            raise UserError(f"rank {self._rank} of {self._world}: ranks count from 0")
        self._run = open_run(path)
        self._config = self._run.config
        self._only_ok, self._shuffle, self._seed = only_ok, shuffle, seed
        # Shared, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which seeds the order of the shards; call it with the same number on all ranks."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        shards = list(self._run.shards)
        if self._shuffle:
            random.Random(f"{self._seed} {int(self._epoch)}").shuffle(shards)
        for shard in shards[self._rank :: self._world][worker::workers]:
            yield from self._items(shard)

    def _items(self, shard: Shard) -> Iterator[dict[str, Any]]:
        for sample, rows in self._run.joined(shard):
            wanted = [row for row in rows if row.status == OK or not self._only_ok]
            if wanted:
                image_3HW = self._image(sample, wanted[0])
                yield from (self._item(image_3HW, row) for row in wanted)

    def _image(self, sample: Sample, row: Row) -> Tensor:
        preprocess = self._config.preprocess
        pixels_HWC: NDArray[np.uint8] = np.zeros((preprocess.crop, preprocess.crop, 3), np.uint8)
        try:
            pixels_HWC = decode(sample.image or b"", preprocess).pixels_HWC
        except DecodeError:
            if row.status == OK:  # the run could decode it
                raise
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()

    def _item(self, image_3HW: Tensor, row: Row) -> dict[str, Any]:
        shape = image_3HW.shape[1:]
        item = {
            "key": row.key,
            "shard": row.shard,
            "index": row.index,
            "status": row.status,
            "image": image_3HW,
            "mask": torch.zeros(shape, dtype=torch.bool) if row.mask_bytes is None else torch.from_numpy(row.mask()),
            "box": torch.tensor(row.boxes[0] if row.boxes else [0, 0, 0, 0]),
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
