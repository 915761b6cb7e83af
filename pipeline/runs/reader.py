"""Read a run: rows in shard order or by key, maps in the original image, rows joined with their samples.

Shape suffixes: H W the network's input, h w a stored map's grid, Y X the upright original.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import groupby, islice, zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.maps.encode import dequantise, unpack_mask
from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.datafile import batches, reading, reading_data
from saltern.pipeline.runs.manifest import data_name, load_run_folder, read_receipts
from saltern.pipeline.runs.places import move, readable
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EXTRACT, ExtractConfig
from saltern.schemas.errors import ShardError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import read_metadata

_AT_ONCE = 64  # rows decoded at a time: 13 MB of 224 x 224 float32 maps


@dataclass(frozen=True)
class Layout:
    """The properties that all rows of a file share."""

    map_dtype: str  # uint8 | float16 | float32
    input_shape: tuple[int, int]  # H, W, pixels


@dataclass(frozen=True, slots=True)
class Row:
    """One (sample, target), with the columns of schemas.saliency.table_schema.

    `map_bytes` and `mask_bytes` hold the columns `map` and `mask`; the methods of these names decode them.
    """

    layout: Layout = field(repr=False)
    key: str
    shard: str
    index: int
    label: int | None
    predicted: int | None
    target: int | None
    score: float | None
    map_bytes: bytes | None = field(repr=False)
    map_height: int | None
    map_width: int | None
    map_lo: float | None
    map_hi: float | None
    mask_bytes: bytes | None = field(repr=False)
    mask_threshold: float | None
    mask_area: float | None
    boxes: list[list[int]] | None  # x0 y0 x1 y1, original pixels, half-open
    image_height: int | None
    image_width: int | None
    geometry: list[float] | None
    status: str
    error: str | None

    @classmethod
    def from_record(cls, layout: Layout, record: Record) -> "Row":
        """Return a record, as it is written, as a row."""
        values: list[Any] = [record.get(name) for name in COLUMNS]
        return cls(layout, *values)

    def map(self, size: str = "native") -> NDArray[np.float32]:
        """Return the map in its own unit, up to the rounding of its stored dtype.

        Args:
            size: native for the stored grid (h, w); input for (H, W), upsampled as for the run's masks.

        Raises:
            ValueError: the row has no map (it failed, or the run was made with --no-map).
            ShardError: the map does not fit its shape.
        """
        if self.map_bytes is None or self.map_height is None or self.map_width is None:
            raise ValueError(f"{self.shard}: {self.key} has no map ({self.error or 'the run was made with --no-map'})")
        shape = (self.map_height, self.map_width)
        try:
            map_hw = dequantise(self.map_bytes, self.layout.map_dtype, shape, self.map_lo, self.map_hi)
        except (ValueError, TypeError) as error:
            raise ShardError(f"{self.shard}: {self.key}: its map does not fit its shape {shape}") from error
        if size == "native":
            return map_hw
        if size != "input":
            raise ValueError(f"size {size!r} is neither native nor input")
        map_HW: NDArray[np.float32] = upsample(torch.from_numpy(map_hw)[None], self.layout.input_shape)[0].numpy()
        return map_HW

    def mask(self) -> NDArray[np.bool_]:
        """Return the mask, bool (H, W), exactly as extracted.

        Raises:
            ValueError: the row has no mask.
            ShardError: the mask does not fit the network's input.
        """
        if self.mask_bytes is None:
            raise ValueError(f"{self.shard}: {self.key} has no mask ({self.error})")
        try:
            return unpack_mask(self.mask_bytes, self.layout.input_shape)
        except ValueError as error:
            raise ShardError(f"{self.shard}: {self.key}: its mask does not fit {self.layout.input_shape}") from error


# The columns of a row in the order of its fields.
COLUMNS = tuple(item.name.removesuffix("_bytes") for item in fields(Row) if item.name != "layout")


def map_in_original(row: Row) -> NDArray[np.float32]:
    """Return the row's map over the upright original: (Y, X), NaN outside of the network's crop.

    Raises:
        ValueError: the row has no map.
    """
    return _in_original(row, row.map())


def mask_in_original(row: Row) -> NDArray[np.bool_]:
    """Return the row's mask over the upright original: bool (Y, X), False outside of the network's crop.

    A pixel is inside if the mask, interpolated there as a map, is at least 0.5.

    Raises:
        ValueError: the row has no mask.
    """
    mask_YX: NDArray[np.bool_] = _in_original(row, row.mask().astype(np.float32)) >= 0.5
    return mask_YX


def _in_original(row: Row, map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    if row.geometry is None or row.image_height is None or row.image_width is None:
        raise ValueError(f"{row.shard}: {row.key} has no geometry ({row.error})")
    return over_frame(map_hw, row.layout.input_shape, row.geometry, row.image_height, row.image_width)


def open_run(path: str, shards: Sequence[str] = ()) -> "SaliencyRun":
    """Open the run in a folder or at an object store's URL.

    Args:
        path: the folder or URL.
        shards: where its tars are now, if they were moved: paths, URLs, globs or folders.

    Raises:
        UserError: there is no extraction, run.json is damaged, or a tar is not one of the run.
    """
    store, run = load_run_folder(path, EXTRACT)
    run, given = move(path, run, shards)
    return SaliencyRun(path, store, run, read_receipts(store, run), given)


class SaliencyRun:
    """The rows of a run, finished or not: of the shards that were done when it was opened, in the order of run.json.

    Iterating yields the rows in shard order and keeps few in memory. Everything that reads rows raises ShardError if a
    data file is missing, truncated or of another run.
    """

    def __init__(
        self, path: str, store: Store, run: Run, receipts: dict[str, Receipt], given: frozenset[str] = frozenset()
    ):
        self.path, self.store, self.run, self.given = path, store, run, given
        self.config = run.config_of(ExtractConfig)
        self.shards = [shard for shard in run.shards if shard.name in receipts]
        self.receipts = [receipts[shard.name] for shard in self.shards]
        # The number of the first row of each shard, and at the end the number of all rows.
        self._starts = np.cumsum([0, *(receipt.rows for receipt in self.receipts)])
        self._group: tuple[str, int, list[Row]] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Row]:
        for shard in self.shards:
            yield from self.read(shard)

    def read(self, shard: Shard) -> Iterator[Row]:
        """Yield the rows of one shard."""
        with self._reading(shard) as (file, layout):
            for batch in batches(file, _AT_ONCE):
                yield from _rows(batch, layout)

    def tar(self, shard: Shard) -> Shard:
        """Return the shard. Raises ShardError if its tar must not be read: see `places.readable`."""
        return readable(shard, shard.name in self.given)

    def joined(self, shard: Shard, more: frozenset[str] = frozenset()) -> Iterator[tuple[Sample, list[Row]]]:
        """Yield each sample of one shard's tar with its rows.

        Args:
            shard: one of the run's; with `take`, its first samples.
            more: extensions of further members to read, besides those of the run.

        Raises:
            ShardError: tar and data file do not hold the same samples; or as read_samples does.
            OSError: the tar cannot be read.
        """
        rows = islice(groupby(self.read(shard), lambda row: row.index), shard.take)
        samples = read_samples(self.tar(shard), named=self.config.members, more=more)
        for sample, group in zip_longest(samples, (list(group) for _, group in rows)):
            if sample is None or group is None or (sample.index, sample.key) != (group[0].index, group[0].key):
                there = "ends" if sample is None else f"has {sample.key!r} at {sample.index}"
                here = "ends" if group is None else f"has {group[0].key!r} at {group[0].index}"
                raise self._broken(shard, f"does not fit {shard.url}: the tar {there}, the data file {here}")
            yield sample, group

    def columns(self, *names: str) -> pa.Table:
        """Return columns of all rows, in shard order; the files are read in parallel."""
        paths = [self.store.full(data_name(shard.name)) for shard in self.shards]
        try:
            with reading(self.path):
                table = ds.dataset(paths, filesystem=self.store.fs, format="parquet").to_table(list(names))
        except ShardError as error:
            raise ShardError(f"{error}; {self._fix}") from error
        if len(table) != len(self):
            raise ShardError(f"{self.path} holds {len(table)} rows, its receipts say {len(self)}; {self._fix}")
        return table

    def at(self, number: int) -> Row:
        """Return a row by its number, counted from 0 in shard order. Its neighbours stay in memory."""
        position = int(np.searchsorted(self._starts, number, "right")) - 1
        shard, within = self.shards[position], number - int(self._starts[position])
        if (
            self._group is None
            or self._group[0] != shard.name
            or not 0 <= within - self._group[1] < len(self._group[2])
        ):
            self._group = (shard.name, *self._row_group(shard, within))
        return self._group[2][within - self._group[1]]

    def _row_group(self, shard: Shard, within: int) -> tuple[int, list[Row]]:
        """Return the row group that holds row `within` of the shard: the number of its first row, and its rows."""
        with self._reading(shard) as (file, layout):
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if within < first + count:
                    return first, _rows(file.read_row_group(group), layout)
                first += count
        raise self._broken(shard, f"holds {first} rows, its receipt says more")

    @cached_property
    def _keys(self) -> pa.ChunkedArray:
        return self.columns("key")["key"] if self.shards else pa.chunked_array([], pa.string())

    def rows(self, key: str, shard: str | None = None) -> list[Row]:
        """Return all rows of a key, in shard order: one for each target, in each shard (or the named one) with the key.

        Without a shard, the first call reads the keys of the whole run. An unknown key has no rows.
        """
        keys, start = (self._keys, 0) if shard is None else self._keys_of(shard)
        numbers = np.flatnonzero(pc.equal(keys, key)) + start  # pc.indices_nonzero crashed on an empty run
        return [self.at(number) for number in numbers.tolist()]

    def _keys_of(self, name: str) -> tuple[pa.ChunkedArray, int]:
        """Return the keys of the shard's rows, none if it is not done, and the number of its first row."""
        position = next((at for at, shard in enumerate(self.shards) if shard.name == name), None)
        if position is None:
            return pa.chunked_array([], pa.string()), 0
        with self._reading(self.shards[position]) as (file, _):
            return file.read(["key"], use_threads=False)["key"], int(self._starts[position])

    def row(self, key: str, shard: str | None = None) -> Row:
        """Return the first row of a key. Raises KeyError if the key has none, or is in several shards."""
        rows = self.rows(key, shard)
        shards = sorted({row.shard for row in rows})
        if len(shards) != 1:
            where = f"is in several shards: name one of {', '.join(shards)}" if shards else "has no row"
            raise KeyError(f"{key!r} {where}")
        return rows[0]

    @property
    def _fix(self) -> str:
        return f"`saltern verify {self.path}` lists what is wrong"

    def _broken(self, shard: Shard, what: str) -> ShardError:
        return ShardError(f"{self.store.full(data_name(shard.name))} {what}; {self._fix}")

    @contextlib.contextmanager
    def _reading(self, shard: Shard) -> Iterator[tuple[pq.ParquetFile, Layout]]:
        """Open a shard's data file. Raises ShardError for whatever is wrong with it, also while it is read."""
        try:
            with reading_data(self.store, self.run, shard) as file:
                metadata = read_metadata(file.schema_arrow)
                height, width = metadata["input_shape"]
                yield file, Layout(metadata["map_dtype"], (height, width))
        except ShardError as error:
            raise ShardError(f"{error}; {self._fix}") from error


def _rows(table: Any, layout: Layout) -> list[Row]:
    """Return the rows of an Arrow table or record batch."""
    columns = {name: table.column(name).to_pylist() for name in COLUMNS}
    # Older runs stored a negative `cls`, which is no class, as the label.
    columns["label"] = [None if label is None or label < 0 else label for label in columns["label"]]
    return [Row(layout, *values) for values in zip(*columns.values(), strict=True)]


def read_columns(store: Store, run: Run, columns: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the named columns of the rows of the shards that are done, in order; no other column is read."""
    done = read_receipts(store, run)
    for shard in run.shards:
        if shard.name not in done or limit == 0:
            continue
        with reading_data(store, run, shard) as file:
            for batch in batches(file, min(512, limit or 512), list(columns)):
                rows = batch.to_pylist()[:limit]
                yield from rows
                if limit is not None:
                    limit -= len(rows)
                    if limit == 0:
                        break
