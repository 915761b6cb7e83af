"""Rows into one Parquet file of the scratch folder; row group by row group, so that memory stays flat."""

import contextlib
import hashlib
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 512  # rows; a float16 map of 224 x 224 makes 50 MB of them

Row = tuple[Any, ...]  # one value a column, in the order of saltern.schemas.saliency.table_schema


class Written(NamedTuple):
    """A closed data file whose footer was read back."""

    path: Path
    digest: str  # sha256, hex
    size: int  # bytes
    rows: int


class ShardWriter:
    """Writes one data file. What is not closed with `close` is removed on leaving the `with`."""

    def __init__(self, scratch: Path, schema: pa.Schema):
        self._path = scratch / f"{uuid.uuid4().hex}.parquet"
        self._schema = schema
        self._rows: list[Row] = []
        self._count = 0
        # Every map, mask and picture differs: a dictionary would only cost.
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

    def write(self, rows: Iterable[Row]) -> None:
        self._rows.extend(rows)
        while len(self._rows) >= ROW_GROUP:
            self._flush(ROW_GROUP)

    def _flush(self, count: int) -> None:
        rows, self._rows = self._rows[:count], self._rows[count:]
        columns = [
            pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), self._schema, strict=True)
        ]
        self._file.write_batch(pa.record_batch(columns, schema=self._schema), row_group_size=count)
        self._count += count

    def close(self) -> Written:
        """Finish the file and read its footer back."""
        if self._rows:
            self._flush(len(self._rows))
        self._file.close()
        found = pq.read_metadata(self._path).num_rows
        if found != self._count:
            raise OSError(f"{self._path} reads back as {found} rows, {self._count} were written")
        with open(self._path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Written(self._path, digest, self._path.stat().st_size, found)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Closing writes a footer, which a full disk refuses: the file goes either way.
            with contextlib.suppress(OSError):
                self._file.close()
            self._path.unlink(missing_ok=True)


def read_rows(path: Path | pa.BufferReader) -> dict[int, list[Row]]:
    """The rows of a data file by the index of their sample, as `ShardWriter.write` takes them."""
    table = pq.read_table(path)
    rows: dict[int, list[Row]] = {}
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        rows.setdefault(row[2], []).append(row)
    return rows


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))
