"""Adversarial sanity of an attack run, as a resumable job of the engine over its data files.

Shape suffixes: N images, C colours, H W the network's input.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image

from saltern.pipeline.device import faults
from saltern.pipeline.engine.conduct import Job, RunOptions
from saltern.pipeline.engine.derived import Source, derive, fields_of_model, reading_results
from saltern.pipeline.extract.request import Pinned, pin
from saltern.pipeline.metrics.measure import fix_of
from saltern.pipeline.metrics.sanity.adversarial import Adversarial, overlap
from saltern.pipeline.metrics.subjects import read_subjects
from saltern.pipeline.runs.begin import new_run
from saltern.pipeline.runs.datafile import batches, data_schema, reading_data
from saltern.pipeline.runs.manifest import read_receipt, read_receipts
from saltern.pipeline.runs.measured import is_of
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import AttackConfig, EvaluateConfig
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.evaluation import ADVERSARIAL, FOUND, evaluation_schema
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import OK

_PICTURES = ("image", "plain_image", "map")
_VALUES = ("overlap", "spearman")
_COLUMNS = ("key", "shard", "index", "status", "error")


class AttackRun:
    """An attack run, with its shards that are done."""

    def __init__(self, path: str, store: Store, run: Run):
        self.path, self.store, self.run, self.given = path, store, run, frozenset[str]()
        done = read_receipts(store, run)
        self.shards = [shard for shard in run.shards if shard.name in done]
        self.receipts = [done[shard.name] for shard in self.shards]


def judge_attacks(
    run: AttackRun, shards: Sequence[Shard], request: Pinned, options: RunOptions
) -> tuple[Adversarial, dict[str, str]]:
    """Compare the maps of an attack run with its plain attack, which knows no map, from the pictures in its rows.

    Writes RUN/metrics/adversarial/ (schemas.evaluation), or goes on with that.

    Args:
        run: that is judged.
        shards: of the run; of one with `take`, its first samples.
        request: the pinned settings.
        options: of the execution; `out` is not used.

    Returns:
        The figures over rows that are ok; the shards that could not be read, with the reason.

    Raises:
        UserError: the run stores no images; or as `derive`.
        StoppedError: the engine stopped before the end; finished shards are kept.
    """
    if not run.run.config_of(AttackConfig).save_images:
        raise UserError(f"{run.path} was made with --no-images, and holds no pictures to compare")
    root = f"{run.path.rstrip('/')}/metrics/{ADVERSARIAL}"
    job = Job(partial(_plan, run, shards, request), partial(AttackedProcessor, source=Source.of(run)))
    results = derive(run, root, job, shards, options, fix_of(run))
    found = Adversarial()
    with reading_results(root):
        for _, _, rows in read_subjects(results, _VALUES):
            usable = rows.filter(pc.is_valid(rows["overlap"]))
            found.add(*(usable[name].to_numpy(zero_copy_only=False) for name in _VALUES))
    return found, results.unread


def _plan(
    run: AttackRun, shards: Sequence[Shard], request: Pinned, existing: Run | None, device: str, workers: int
) -> tuple[Run, list[str]]:
    made = EvaluateConfig(
        **fields_of_model(run.run.config),
        precision="fp32",
        family=ADVERSARIAL,
        source=run.run.fingerprint,
        controls=False,
        columns=tuple(evaluation_schema(ADVERSARIAL).names),
        **pin(request, existing, device, workers),
    )
    return new_run(made, list(shards), run.run.class_names), []


class AttackedProcessor:
    """Measures shards of an attack run. It reads no tar.

    Args:
        spec: of the results.
        source: the attack run.
    """

    def __init__(self, spec: Spec, source: Source):
        self._config = spec.run.config_of(EvaluateConfig)
        self._run, self._store, self._device = source.run, Store(source.path), torch.device(spec.device)
        self._outlet, self._schema = Outlet(spec), data_schema(spec.run, {})
        self.images: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(max(1, spec.decode_threads), "saltern-decode")
        # torch keeps its number of threads for each calling thread.
        limit = partial(torch.set_num_threads, self._config.torch_threads)
        self._compute = ThreadPoolExecutor(1, "saltern-device", limit)

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        """Measure one shard. A receipt of the same data file is confirmed.

        Raises:
            ShardError: the data file is damaged.
            OSError: an error of the environment, worth a retry.
            OutputError: the folder accepts no more data.
        """
        digest = read_receipt(self._store, self._run, shard.name).digest
        if earlier is not None and is_of(earlier, digest):
            return Made(replace(earlier, mtime_ns=shard.mtime_ns), {})
        tally = Tally()
        self.images[shard.name] = 0
        try:
            with self._outlet.open(self._schema, tally) as writer:
                for rows in self._read(shard):
                    with tally.phase("compute"):
                        made = self._compute.submit(self._measure, rows).result()
                    with self._outlet.writing(tally):
                        writer.write(made)
                    tally.samples += rows.num_rows  # an attack run has one row for each sample
                    tally.statuses[OK] += rows.num_rows
                    self.images[shard.name] += rows.num_rows
                tally.content = int(digest[:8], 16) << 32
                return self._outlet.close(shard, writer, tally, self._config.batch_size)
        finally:
            del self.images[shard.name]

    def close(self) -> None:
        """Release threads."""
        self._threads.shutdown()
        self._compute.shutdown()

    def _read(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        columns = [*_COLUMNS, *_PICTURES]
        with reading_data(self._store, self._run, shard) as file:
            for batch in batches(file, self._config.batch_size, columns):
                rows = batch if shard.take is None else batch.filter(pc.less(batch["index"], shard.take))
                if not rows.num_rows:
                    return
                yield rows

    def _measure(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return the rows of the results; those of rows that are not ok have no values."""
        at_N = np.flatnonzero(pc.equal(rows["status"], OK))
        values_2N = np.full((2, rows.num_rows), np.nan)
        if len(at_N):
            usable = rows.take(pa.array(at_N))
            image_NHWC, plain_NHWC, map_NHW = (self._pictures(usable[name]) for name in _PICTURES)
            with faults():
                change_NHW = (plain_NHWC.int() - image_NHWC.int()).abs().sum(-1)
                values_2N[:, at_N] = torch.stack(overlap(map_NHW, change_NHW)).cpu().numpy()
        there = {name: rows[name] for name in _COLUMNS} | {"subject": pa.array([FOUND] * rows.num_rows)}
        there |= {name: pa.array(own, from_pandas=True) for name, own in zip(_VALUES, values_2N, strict=True)}
        return pa.record_batch([there[name] for name in self._schema.names], schema=self._schema)

    def _pictures(self, column: pa.Array) -> torch.Tensor:
        """Decode pictures of one size, to the device."""
        return torch.from_numpy(np.stack(list(self._threads.map(_decode, column.to_pylist())))).to(self._device)


def _decode(raw: bytes) -> NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(io.BytesIO(raw)))
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a damaged PNG
        raise ShardError(f"a picture in the data file cannot be read ({error})") from error
