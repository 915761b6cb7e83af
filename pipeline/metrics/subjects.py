"""Read the data files of an evaluation, each once, many at a time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.engine.derived import Derived
from saltern.pipeline.runs.datafile import reading
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.storage.ahead import read_ahead
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard


def read_subjects(results: Derived, columns: Sequence[str]) -> Iterator[tuple[str, str, pa.RecordBatch]]:
    """Yield the rows of each subject as (shard, subject, rows), in the order of the shards, in pieces.

    A file is fetched whole, since it holds little besides these columns and a request costs more than its bytes.

    Raises:
        ShardError: a data file is missing or damaged.
        UserError: the store fails.
    """
    store, shards = results.store, results.shards
    with closing(read_ahead(partial(_fetch, store), shards, size=len)) as files:
        for shard, raw in zip(shards, files, strict=True):
            if sha256(raw).hexdigest() != results.digests[shard.name]:
                raise ShardError(f"{store.full(data_name(shard.name))} is not what was written: its digest differs")
            for subject, rows in _pieces(store, shard, raw, columns):
                yield shard.name, subject, rows


def read_shard(store: Store, shard: Shard, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yield the rows of each subject of one shard, in pieces. Raises as `read_subjects`."""
    return _pieces(store, shard, _fetch(store, shard), columns)


def _pieces(store: Store, shard: Shard, raw: bytes, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    with reading(store.full(data_name(shard.name))):
        file = pq.ParquetFile(pa.BufferReader(raw))
        for batch in file.iter_batches(512, columns=["subject", *columns], use_threads=False):
            yield from _by_subject(batch)


def _by_subject(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yield each subject with its rows, in their order."""
    subjects = batch["subject"].to_pylist()
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    if len(numbers) > 1:
        number_N = np.array([numbers[subject] for subject in subjects])
        batch = batch.take(pa.array(number_N.argsort(kind="stable")))
    start = 0
    for subject, count in Counter(subjects).items():
        yield subject, batch.slice(start, count)
        start += count


def _fetch(store: Store, shard: Shard) -> bytes:
    place = store.full(data_name(shard.name))
    try:
        raw = store.read(data_name(shard.name))
    except OSError as error:  # the file may be whole
        raise UserError(f"{place} cannot be read ({error}); repeat the command") from error
    if raw is None:
        raise ShardError(f"{place} cannot be read (it is missing)")
    return raw
