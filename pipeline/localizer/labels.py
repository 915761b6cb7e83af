"""The pseudo-labels of a run: one file of fixed-size records, memory-mapped, so that any sample's is read at once.

Shape suffixes: N samples of a shard, B batch, H W the run's input, h w the stored grid, g the training's mask grid.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.metrics.judge import UNIT_MAPS
from saltern.pipeline.runs.reader import Row, SaliencyRun
from saltern.pipeline.storage.files import publish
from saltern.pipeline.training.index import Index, places_of
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK
from saltern.schemas.sizes import square_of

MAPS, MASKS, BOXES = KINDS = ("maps", "masks", "boxes")
CELLS = 32  # of a stored grid along each side, at most: a record has 1 KB and a few bytes


class Targets(NamedTuple):
    """What a batch of crops is to be like, on the device."""

    mask_Bgg: Tensor  # float32, in [0, 1]
    known_Bgg: Tensor  # float32, 1 where the label is known: inside of what the run's network saw


@dataclass(frozen=True)
class Labels:
    """The labels of all samples of an index, in its order."""

    path: Path
    kind: str  # one of KINDS
    cells: tuple[int, int]  # h, w of the stored grids; 0, 0 for boxes
    side: int  # H and W
    count: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a record: the box in the original, geometry of the run's input, and the grid, 255 = 1."""
        return np.dtype([("box", "<f4", 4), ("geometry", "<f4", 4), ("grid", "u1", self.cells)])

    @cached_property
    def _records(self) -> NDArray[Any]:
        return np.memmap(self.path, self.dtype, "r", shape=(self.count,))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_records"}

    def read(self, number_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return grid_Bhw uint8, box_B4 and geometry_B4 float32 of some samples, on the host."""
        records = self._records[number_B.numpy()]
        return tuple(torch.from_numpy(np.ascontiguousarray(records[name])) for name in ("grid", "box", "geometry"))  # type: ignore[return-value]


def make_labels(run: SaliencyRun, kind: str, folder: Path) -> tuple[Index, Labels, str]:
    """Write the labels of a run's ok rows to a file in `folder`; return the index of their images, and a digest.

    Of a sample with several targets, the first ok row counts. One shard is in memory at a time.

    Raises:
        UserError: the run has no such labels, a shard's tar cannot be indexed, or no row is ok.
        ShardError: a data file is damaged, or a tar is not what the run read.
    """
    if kind == MAPS and not run.config.save_map:
        raise UserError(f"{run.path} was made with --no-map: give --labels {MASKS} or --labels {BOXES}")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, digest, places = folder / f".unfinished-labels-{os.getpid()}", hashlib.sha256(), []
    labels = Labels(unfinished, kind, (0, 0), square_of(run.config.preprocess.crop), 0)
    with unfinished.open("wb") as file:
        for number, shard in enumerate(run.shards):
            at, rows = _join(run, shard)
            if not rows:
                continue
            grids_Nhw = _grids(kind, rows, run.config.method)
            labels = replace(labels, cells=grids_Nhw.shape[1:], count=labels.count + len(rows))
            records: NDArray[Any] = np.zeros(len(rows), labels.dtype)
            records["box"] = [row.boxes[0] for row in rows if row.boxes]
            records["geometry"], records["grid"] = [row.geometry for row in rows], grids_Nhw
            digest.update(records.tobytes())
            file.write(records.tobytes())
            places.append(np.column_stack([np.full(len(rows), number), at]))
    if not places:
        raise UserError(f"{run.path} has no row to learn from: none is ok and has an image in its tar")
    number_N, offset_N, size_N = (column.copy() for column in np.concatenate(places).T)
    tars = [run.tar(shard) for shard in run.shards]
    index = Index(tars, number_N, offset_N, size_N, np.arange(labels.count))
    name = digest.hexdigest()
    labels = replace(labels, path=folder / f"labels-{name[:16]}.bin")
    publish(unfinished, labels.path)
    return index, labels, name


def _join(run: SaliencyRun, shard: Shard) -> tuple[NDArray[np.int64], list[Row]]:
    """Return offset and size (N, 2) of the images of a shard that have an ok row, and the rows."""
    first: dict[str, Row] = {}
    for row in run.read(shard):
        if row.status == OK and row.boxes:
            first.setdefault(row.key, row)
    places = [place for place in places_of(run.tar(shard), named=run.config.members) if place.key in first]
    if len(places) < len(first):
        missing = next(iter(first.keys() - {place.key for place in places}))
        raise ShardError(f"{shard.url}: it has no image {missing!r}, which the run read; restore the tar")
    at = np.array([(place.offset, place.size) for place in places], np.int64).reshape(-1, 2)
    return at, [first[place.key] for place in places]


def _grids(kind: str, rows: Sequence[Row], method: str) -> NDArray[np.uint8]:
    """Return what is stored of the rows' maps or masks: uint8 (N, h, w), 255 = 1."""
    if kind == BOXES:
        return np.zeros((len(rows), 0, 0), np.uint8)
    parts = [_grid(kind, rows[start : start + 64], method) for start in range(0, len(rows), 64)]
    return np.concatenate(parts)


def _grid(kind: str, rows: Sequence[Row], method: str) -> NDArray[np.uint8]:
    values_NHW = torch.from_numpy(np.stack([row.mask() if kind == MASKS else row.map() for row in rows])).float()
    if kind == MAPS and method not in UNIT_MAPS:
        low_N, high_N = values_NHW.amin((1, 2)), values_NHW.amax((1, 2))
        span_N = (high_N - low_N).clamp_min(1e-12)
        values_NHW = (values_NHW - low_N[:, None, None]) / span_N[:, None, None]
    size = min(CELLS, values_NHW.shape[1]), min(CELLS, values_NHW.shape[2])
    small_Nhw = F.adaptive_avg_pool2d(values_NHW[:, None], size)[:, 0]
    grid_Nhw: NDArray[np.uint8] = (small_Nhw.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return grid_Nhw


def targets(
    kind: str, side: int, grid_Bhw: Tensor, box_B4: Tensor, geometry_B4: Tensor, crop_B4: Tensor, cells: int
) -> Targets:
    """Return the labels of a batch as they lie in its crops. All on one device; nothing waits.

    Args:
        kind: one of KINDS.
        side: of the run's input, pixels.
        grid_Bhw, box_B4, geometry_B4: of `Labels.read`.
        crop_B4: scale x, scale y, offset x, offset y from shares of the crop (0..1) to the original; a scale below 0
            mirrors.
        cells: g, of the mask.
    """
    scale_B2, offset_B2 = crop_B4[:, :2], crop_B4[:, 2:]
    # Shares of the crop -> shares of the run's input: a * share + b.
    span_B2 = geometry_B4[:, :2] * side
    a_B2, b_B2 = scale_B2 / span_B2, (offset_B2 - geometry_B4[:, 2:]) / span_B2
    centre_g = (torch.arange(cells, device=crop_B4.device) + 0.5) / cells
    at_B2g = a_B2[:, :, None] * centre_g + b_B2[:, :, None]
    known_B2g = (at_B2g >= 0) & (at_B2g <= 1)
    known_Bgg = (known_B2g[:, 1, :, None] & known_B2g[:, 0, None, :]).float()
    if kind == BOXES:
        place_B2g = offset_B2[:, :, None] + scale_B2[:, :, None] * centre_g
        inside_B2g = (place_B2g >= box_B4[:, :2, None]) & (place_B2g < box_B4[:, 2:, None])
        mask_Bgg = (inside_B2g[:, 1, :, None] & inside_B2g[:, 0, None, :]).float()
    else:
        x_Bgg = at_B2g[:, 0, None, :].expand(-1, cells, -1)
        place_Bgg2 = torch.stack([x_Bgg, at_B2g[:, 1, :, None].expand_as(x_Bgg)], 3) * 2 - 1
        stored_B1hw = grid_Bhw[:, None].float() / 255
        mask_Bgg = F.grid_sample(stored_B1hw, place_Bgg2, padding_mode="border", align_corners=False)[:, 0]
    return Targets(mask_Bgg, known_Bgg)
