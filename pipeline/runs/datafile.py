"""The data files of a run: the schema that its config determines, and opening a file only if it has that schema."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.storage.store import Store
from saltern.schemas.attack import attack_schema
from saltern.schemas.config import AttackConfig, EvaluateConfig, ExportConfig, ExtractConfig
from saltern.schemas.errors import ShardError
from saltern.schemas.evaluation import evaluation_schema
from saltern.schemas.export import export_schema
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import read_metadata, table_schema, with_metadata
from saltern.schemas.visualization import visualization_schema

# Metadata that depends on the method and is not in run.json.
_MEASURED = ("map_shape", "map_clip_quantile")
_SIDE = 2**15  # of a stored map, at most


def data_schema(run: Run, measured: Mapping[str, Any]) -> pa.Schema:
    """Return the columns and metadata of the run's data files.

    Args:
        run: content of run.json.
        measured: of an extraction, `map_shape` (height and width, None without maps) and `map_clip_quantile`.
    """
    config = run.config
    origin: dict[str, Any] = {"fingerprint": run.fingerprint, "config": config.marked(), "versions": run.versions}
    if isinstance(config, EvaluateConfig):
        return with_metadata(evaluation_schema(config.family), origin)
    if isinstance(config, ExportConfig):
        return with_metadata(export_schema(config.form), origin)
    if not isinstance(config, ExtractConfig | AttackConfig):
        return with_metadata(visualization_schema(), origin)
    origin["input_shape"] = list(config.preprocess.shape)
    if isinstance(config, AttackConfig):
        return with_metadata(attack_schema(), origin)
    origin |= {"map_dtype": config.map_dtype, "mask_bit_order": "big", **measured}
    shape = measured.get("map_shape")
    size = None if shape is None else shape[0] * shape[1] * np.dtype(config.map_dtype).itemsize
    return with_metadata(table_schema(size), origin)


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Raise ShardError, which names the file, for whatever Arrow raises if a file is missing or damaged."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"{place} cannot be read ({' '.join(str(error).split())})") from error


def open_data(run: Run, place: str, source: Any) -> pq.ParquetFile:
    """Open a data file of the run.

    Args:
        run: content of run.json.
        place: of the file, for messages.
        source: an open file or a buffer.

    Raises:
        ShardError: it is damaged, of another run, or its columns or metadata are not those that the run writes.
    """
    with reading(place):
        file = pq.ParquetFile(source)
        schema = file.schema_arrow
    found = read_metadata(schema)
    if found.get("fingerprint") != run.fingerprint:
        raise ShardError(f"{place} has the fingerprint {found.get('fingerprint')}, its run {run.fingerprint}")
    measured = {name: found[name] for name in _MEASURED if name in found}
    expected = data_schema(run, measured) if _plausible(run, measured) else None
    # Parquet names the fields of lists otherwise than Arrow, which only `equals` with metadata minds.
    if expected is None or not schema.equals(expected) or schema.metadata != expected.metadata:
        raise ShardError(f"{place} has other columns or metadata than its run writes{_difference(schema, expected)}")
    return file


@contextlib.contextmanager
def reading_data(store: Store, run: Run, shard: Shard) -> Iterator[pq.ParquetFile]:
    """Open a shard's data file. Raises ShardError as `open_data`, and for errors while it is read."""
    place = store.full(data_name(shard.name))
    with reading(place), store.fs.open_input_file(place) as source:
        yield open_data(run, place, source)


def batches(file: pq.ParquetFile, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a data file in batches of at most `size`, with one row group in memory.

    A single read of all row groups would keep all the bytes that it has fetched.
    """
    for group in range(file.num_row_groups):
        yield from file.iter_batches(size, [group], columns, use_threads=False)


def _plausible(run: Run, measured: Mapping[str, Any]) -> bool:
    if not isinstance(run.config, ExtractConfig):
        return not measured
    if len(measured) < len(_MEASURED):
        return False
    shape, quantile = measured["map_shape"], measured["map_clip_quantile"]
    sides = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < _SIDE for n in shape)
    clipped = quantile is None or (type(quantile) in (int, float) and 0 < quantile <= 1)
    return clipped and (sides if run.config.save_map else shape is None)


def _difference(schema: pa.Schema, expected: pa.Schema | None) -> str:
    if expected is None:
        return " (the shape of its maps)"
    for field in expected:
        if field.name not in schema.names or not schema.field(field.name).equals(field):
            return f" (column {field.name})"
    return "" if schema.equals(expected) else " (its columns)"
