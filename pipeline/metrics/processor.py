"""The processor of an evaluation: joins a shard's samples with their rows, measures them, and writes the values."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from saltern.pipeline.device import arithmetic, faults
from saltern.pipeline.engine.derived import Source, reading_tar
from saltern.pipeline.metrics.control_rows import control_rows
from saltern.pipeline.metrics.family import Batch, Family
from saltern.pipeline.runs.columns import Record, from_records
from saltern.pipeline.runs.datafile import data_schema
from saltern.pipeline.runs.manifest import read_receipt
from saltern.pipeline.runs.measured import is_of
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.decoder import Decoder, make_decoder
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, content_of, fold
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.errors import ShardError
from saltern.schemas.evaluation import CONTROLS, FOUND
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK

_AHEAD = 2  # batches that are decoded before they are needed
_THREADS = 16  # that decode, at most


class MetricProcessor:
    """Measures shards of a run by one family of metrics.

    Args:
        spec: of the evaluation.
        source: the run that is judged.
        family: built in the thread that computes.
    """

    def __init__(
        self, spec: Spec, source: Source, family: Callable[[ExtractConfig, EvaluateConfig, torch.device], Family]
    ):
        self._config = spec.run.config_of(EvaluateConfig)
        self._run = source.open()
        self._device = torch.device(spec.device)
        self._outlet, self.schema = Outlet(spec), data_schema(spec.run, {})
        self.images: dict[str, int] = {}
        self._workers = min(_THREADS, max(1, spec.decode_threads))
        self._threads = ThreadPoolExecutor(self._workers, "saltern-decode")
        self._compute = ThreadPoolExecutor(1, "saltern-device", self._begin)
        inputs = self._run.config, self._config, self._device
        self._family = self._compute.submit(self._guarded, family, *inputs).result()
        decodes = self._config.controls or self._family.needs_pixels
        self._decoder: Decoder | None = make_decoder(self._run.config.preprocess) if decodes else None

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        """Measure one shard. A receipt of the same data file is confirmed.

        Raises:
            ShardError: tar and data file do not fit, or one of them is damaged.
            OSError: an error of the environment, worth a retry.
            OutputError: the folder accepts no more data.
        """
        digest = read_receipt(self._run.store, self._run.run, shard.name).digest
        if earlier is not None and is_of(earlier, digest):
            with reading_tar(shard):
                read = content_of(self._run.tar(shard), named=self._run.config.members, more=self._family.members)
            if read is not None and earlier.content is not None and earlier.content.endswith(read):
                return Made(replace(earlier, mtime_ns=shard.mtime_ns), {})
        self.images[shard.name] = 0
        try:
            return self._process(shard, digest)
        finally:
            del self.images[shard.name]

    def close(self) -> None:
        """Release threads and device memory."""
        self._threads.shutdown()
        del self._family
        self._compute.shutdown()

    def _begin(self) -> None:
        """Set torch's threads, which it keeps for each calling thread."""
        torch.set_num_threads(self._config.torch_threads)

    def _process(self, shard: Shard, digest: str) -> Made:
        tally, content = Tally(), 0
        with (
            self._outlet.open(self.schema, tally) as writer,
            contextlib.closing(prefetch(lambda: self._joined(shard), _AHEAD, _bytes)) as batches,
        ):
            for batch in batches:
                with tally.phase("compute"):
                    records = self._compute.submit(self._guarded, self._measure, batch).result()
                with self._outlet.writing(tally):
                    writer.write(from_records(records, self.schema))
                for sample in batch.samples:
                    content = fold(content, sample)
                tally.samples += len(batch.samples)
                tally.statuses[OK] += len(records)  # each was judged; a record's own status says how
                self.images[shard.name] += len(batch.samples)
            tally.content = int(digest[:8], 16) << 32 | content
            return self._outlet.close(shard, writer, tally, self._config.batch_size)

    def _guarded(self, work: Callable[..., Any], *inputs: Any) -> Any:
        """Run in the thread that computes, with the evaluation's arithmetic."""
        config = self._config
        with arithmetic(config.precision, deterministic=config.deterministic, what=config.family), faults():
            return work(*inputs)

    def _joined(self, shard: Shard) -> Iterator[Batch]:
        """Yield batches of the run's rows, decoded. Runs in a thread ahead of the rest."""
        pairs = self._run.joined(shard, self._family.members)
        while some := self._next(shard, pairs):
            samples, rows = [sample for sample, _ in some], [own[0] for _, own in some]
            pixels_MHWC = self._pixels([sample for sample, row in zip(samples, rows, strict=True) if seen(row)])
            batch = Batch(FOUND, samples, rows, pixels_MHWC)
            yield batch if self._config.controls else self._begun(batch)

    def _next(self, shard: Shard, pairs: Iterator[tuple[Sample, list[Row]]]) -> list[tuple[Sample, list[Row]]]:
        with reading_tar(shard):
            return list(islice(pairs, self._config.batch_size))

    def _begun(self, batch: Batch) -> Batch:
        return replace(batch, begun=self._family.begin(batch, self._threads))

    def _pixels(self, samples: Sequence[Sample]) -> Tensor | None:
        """Decode the images as the run did, each thread some of them."""
        if self._decoder is None or not samples:
            return None
        images = [sample.image or b"" for sample in samples]
        each = -(-len(images) // self._workers)
        parts = list(self._threads.map(self._decoder, [images[at : at + each] for at in range(0, len(images), each)]))
        for part in parts:
            for at, (status, reason) in part.problems.items():
                raise ShardError(f"{samples[at].key}: the run could read this image, and now it is {status}: {reason}")
        return torch.cat([part.pixels_BHWC for part in parts])

    def _measure(self, batch: Batch) -> list[Record]:
        """Return the records of a batch, sample by sample, those of a sample in the order of the subjects."""
        found = []
        for own in self._controls(batch) if self._config.controls else [batch]:
            values = self._family.measure(own)
            found.append([record_of(own.subject, *pair) for pair in zip(own.rows, values, strict=True)])
        return [record for records in zip(*found, strict=True) for record in records]

    def _controls(self, batch: Batch) -> list[Batch]:
        """Return the batch under each control."""
        made = []
        for subject in CONTROLS:
            rows = control_rows(subject, batch.rows, batch.pixels_MHWC, self._run.config)
            made.append(self._begun(replace(batch, subject=subject, rows=rows)))
        return made


def seen(row: Row) -> bool:
    """Return whether the run could read the row's image."""
    return row.geometry is not None


def record_of(subject: str, row: Row, values: Record) -> Record:
    """Return a row of the data file."""
    identity = {"key": row.key, "shard": row.shard, "index": row.index, "subject": subject}
    return {**identity, "status": row.status, "error": row.error, **values}


def _bytes(batch: Batch) -> int:
    return sum(sample.size for sample in batch.samples) + (0 if batch.pixels_MHWC is None else batch.pixels_MHWC.nbytes)
