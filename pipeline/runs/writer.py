"""Write records into one Parquet file in the scratch folder, row group by row group, so that memory stays constant."""

import contextlib
import hashlib
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.storage.files import fsync

ROW_GROUP = 512  # rows; 512 float16 maps of 224 x 224 take 50 MB

Record = dict[str, Any]  # one row by column name; a column that is absent is null


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
        self._records: list[Record] = []
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

    def write(self, records: Iterable[Record]) -> None:
        """Add records; full row groups are written at once."""
        self._records.extend(records)
        while len(self._records) >= ROW_GROUP:
            self._flush(ROW_GROUP)

    def _flush(self, count: int) -> None:
        records, self._records = self._records[:count], self._records[count:]
        columns = [pa.array([record.get(field.name) for record in records], field.type) for field in self._schema]
        self._file.write_batch(pa.record_batch(columns, schema=self._schema), row_group_size=count)
        self._count += count

    def close(self) -> Written:
        """Finish the file and read its footer back."""
        if self._records:
            self._flush(len(self._records))
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


def read_records(path: Path | pa.BufferReader) -> dict[int, list[Record]]:
    """Return the records of a data file by the index of their sample."""
    records: dict[int, list[Record]] = {}
    for record in pq.read_table(path).to_pylist():
        records.setdefault(record["index"], []).append(record)
    return records


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))
