"""Write rows into one Parquet file in the scratch folder, row group by row group, so that memory stays constant."""

import contextlib
import hashlib
import uuid
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.storage.files import fsync

ROW_GROUP = 512  # rows; 512 float16 maps of 224 x 224 take 50 MB


class Written(NamedTuple):
    """A closed data file whose footer was read back."""

    path: Path
    digest: str  # sha256, hex
    size: int  # bytes
    rows: int


class ShardWriter:
    """Writes one data file. Leaving the `with` on an error removes the file."""

    def __init__(self, scratch: Path, schema: pa.Schema):
        self._path = scratch / f"{uuid.uuid4().hex}.parquet"
        self._schema = schema
        self._held: list[pa.RecordBatch] = []  # less than a row group
        self._count = 0
        # Every map, mask and picture differs, so a dictionary or statistics of them would only cost.
        plain = [field.name for field in schema if _is_bytes(field.type)]
        self._file = pq.ParquetWriter(
            self._path,
            schema,
            compression="zstd",
            use_dictionary=[name for name in schema.names if name not in (*plain, "boxes", "geometry")],
            write_statistics=[name for name in schema.names if name not in plain],
            store_schema=True,
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, rows: pa.RecordBatch) -> None:
        """Add rows; full row groups are written at once."""
        self._held.append(rows)
        if sum(held.num_rows for held in self._held) >= ROW_GROUP:
            rows = pa.concat_batches(self._held)
            while rows.num_rows >= ROW_GROUP:
                self._flush(rows.slice(0, ROW_GROUP))
                rows = rows.slice(ROW_GROUP)
            self._held = [rows]

    def _flush(self, group: pa.RecordBatch) -> None:
        self._file.write_batch(group, row_group_size=ROW_GROUP)
        self._count += group.num_rows

    def close(self) -> Written:
        """Finish the file and read its footer back."""
        if any(held.num_rows for held in self._held):
            self._flush(pa.concat_batches(self._held))
        self._file.close()
        rows = pq.read_metadata(self._path).num_rows
        if rows != self._count:
            raise OSError(f"{self._path} reads back as {rows} rows, {self._count} were written")
        with open(self._path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        fsync(self._path)
        return Written(self._path, digest, self._path.stat().st_size, rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Closing writes a footer, which a full disk refuses; the file is removed either way.
            with contextlib.suppress(OSError):
                self._file.close()
            self._path.unlink(missing_ok=True)


def read_rows(source: Path | pa.BufferReader, schema: pa.Schema) -> dict[int, pa.RecordBatch]:
    """Return the rows of a data file, in the form of `schema`, by the index of their sample."""
    table = pq.read_table(source).combine_chunks()
    arrays = [
        table[field.name].cast(field.type).combine_chunks()
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    every, found = pa.record_batch(arrays, schema=schema), dict[int, pa.RecordBatch]()
    index_R = table["index"].to_numpy()
    first = np.flatnonzero(np.diff(index_R, prepend=-1))
    for start, stop in zip(first.tolist(), [*first[1:].tolist(), len(index_R)], strict=False):
        found[int(index_R[start])] = every.slice(start, stop - start)
    return found


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))
