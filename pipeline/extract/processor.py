"""The shard processor. It is built once for a device, then called with any number of shards, two at a time.

read -> decode -> task -> write, each in its own threads: a reader for each shard in flight, a pool that decodes, one
thread that owns the device (so that a batch's bits do not depend on what else runs), and the caller, who writes.
"""

import contextlib
import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import torch

from saltern.pipeline.device import arithmetic, faults, out_of_memory
from saltern.pipeline.extract.batch import Batch, Piece, regroup
from saltern.pipeline.extract.task import Explained, Pending, Task
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.runs.writer import ROW_GROUP, ShardWriter, read_rows
from saltern.pipeline.shards.decoder import Decoder, make_decoder
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, content_of, fold, read_samples
from saltern.schemas.config import MethodConfig
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK, OUT_OF_MEMORY

AHEAD = 2  # batches explained before the oldest is written; as many again are being decoded

_PIECE_IMAGES, _PIECE_BYTES = 16, 2**25  # that a thread decodes at once, at most

Running = Future[list[Pending | None]]
Kept = dict[int, pa.RecordBatch]  # rows of an earlier run, by the index of their sample


class Processor:
    """A processor that runs a task on shards. `process` may run in two threads at once.

    Args:
        spec: of the run.
        task: processes the samples; built in the device's thread.
        decoder: replaces that of the run.

    Raises:
        UserError: the model, its weights or the method are not available here, or the weights are not the run's.
    """

    def __init__(self, spec: Spec, task: Callable[[Spec, torch.device], Task], decoder: Decoder | None = None):
        config = self.config = spec.run.config_of(MethodConfig)
        self._labels, self._members = config.labels, config.members
        self.images: dict[str, int] = {}  # samples handed to a writer, by shard in process, for the progress line
        self._outlet = Outlet(spec)
        self._retry_failed = spec.retry_failed
        self._device = torch.device(spec.device)
        self._chunk = self.config.batch_size
        self._decoder = decoder or make_decoder(config.preprocess, config.decoder, spec.device, spec.decode_threads)
        on_host = self._decoder.device.type == "cpu"
        threads, ahead = spec.decode_threads if on_host else AHEAD, AHEAD * config.batch_size
        self._decoders = ThreadPoolExecutor(threads, "saltern-decode")
        # All threads have work before a batch is complete.
        self._piece = max(1, min(_PIECE_IMAGES, ahead // (2 * threads))) if on_host else config.batch_size
        self._depth = -(-ahead // self._piece)
        self._compute = ThreadPoolExecutor(1, "saltern-device", self._begin)
        self._task = self._compute.submit(self._build, task, spec).result()

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        """Process one shard into the scratch folder.

        Args:
            shard: the shard to read.
            earlier: its receipt. If it was written for this very tar, it is confirmed, or with --retry-failed only the
                samples that are not ok are done again.

        Raises:
            ShardError: the tar is broken as a whole.
            OSError: an environment error (network, missing file); worth a retry.
            MemoryError: memory ran out outside of the task.
            OutputError: the run's folder accepts no more data.
            DeviceLostError: this process cannot be used any more.
        """
        self.images[shard.name] = 0
        try:
            with faults():
                return self._process(shard, earlier)
        finally:
            del self.images[shard.name]

    def close(self) -> None:
        """Release threads, hooks and device memory. No shard is in process."""
        self._decoders.shutdown()
        self._compute.submit(self._release).result()
        self._compute.shutdown()

    def _begin(self) -> None:
        """Set what torch keeps for each calling thread, in the one that computes.

        Its stream is not the default one, which waits for other streams, such as nvJPEG's, and they for it.
        """
        torch.set_num_threads(self.config.torch_threads)
        if self._device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _build(self, task: Callable[[Spec, torch.device], Task], spec: Spec) -> Task:
        with self._arithmetic(), faults():
            return task(spec, self._device)

    def _arithmetic(self) -> contextlib.AbstractContextManager[None]:
        config = self.config
        return arithmetic(
            config.precision, deterministic=config.deterministic, what=f"{config.method} of {config.model}"
        )

    def _release(self) -> None:
        self._task.close()
        del self._task
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _process(self, shard: Shard, earlier: Receipt | None) -> Made:
        if earlier is None:
            return self._make(shard, {})
        if not (self._retry_failed and earlier.failed):
            same = content_of(shard, named=self._members, as_listed=True) == earlier.content
            return Made(replace(earlier, mtime_ns=shard.mtime_ns), {}) if same else self._make(shard, {})
        made = self._make(shard, self._ok_rows(shard, earlier))
        return made if made.receipt.content == earlier.content else self._make(shard, {})

    def _make(self, shard: Shard, kept: Kept) -> Made:
        tally = Tally()
        with (
            self._outlet.open(self._task.schema, tally) as writer,
            contextlib.closing(self._batches(shard, kept, tally)) as batches,
        ):
            pending: deque[tuple[Batch, Running | None]] = deque()
            for batch in batches:
                pending.append((batch, self._submit(batch)))
                if len(pending) > AHEAD:
                    self._write(writer, shard, *pending.popleft(), tally)
            while pending:
                self._write(writer, shard, *pending.popleft(), tally)
            return self._outlet.close(shard, writer, tally, min(self._chunk, self.config.batch_size))

    def _ok_rows(self, shard: Shard, earlier: Receipt) -> Kept:
        """Return the existing rows of the samples whose rows are all ok, by the sample's index.

        There are none if the data file is not the receipt's, or if the receipt does not tell what the tar held.
        """
        raw = self._outlet.store.read(data_name(shard.name))
        if raw is None or earlier.content is None or hashlib.sha256(raw).hexdigest() != earlier.digest:
            return {}
        found = read_rows(pa.BufferReader(raw), self._task.schema)
        return {index: own for index, own in found.items() if set(own["status"].to_pylist()) == {OK}}

    def _batches(self, shard: Shard, kept: Kept, tally: Tally) -> Generator[Batch, None, None]:
        """Yield decoded batches in shard order. Every one but the last has `batch_size` images, whatever the timing."""

        def decoded(pieces: Iterable[Piece]) -> Iterator[Batch]:
            for piece in pieces:
                batch, seconds = piece.wait()
                tally.seconds["decode"] += seconds
                yield batch

        read = prefetch(lambda: self._pieces(shard, kept, tally), self._depth, lambda piece: piece.size)
        with contextlib.closing(read) as pieces:
            size = self.config.batch_size
            yield from regroup(decoded(pieces), size, max(ROW_GROUP, size))

    def _pieces(self, shard: Shard, kept: Kept, tally: Tally) -> Iterator[Piece]:
        """Yield samples as they are read, and start to decode them. Runs in the reader's thread."""
        samples = read_samples(shard, self._labels, named=self._members, as_listed=True)
        tally.content = 0
        while True:
            with tally.phase("read"):
                piece = Piece()
                for sample in samples:
                    tally.content = fold(tally.content, sample)
                    self._add(piece, sample, kept)
                    if len(piece.images) == self._piece or len(piece) == ROW_GROUP or piece.size >= _PIECE_BYTES:
                        break
            if not len(piece):
                return
            yield piece.start(self._decoders, self._decoder)

    def _add(self, piece: Piece, sample: Sample, kept: Kept) -> None:
        """Add a sample to a piece. Of one that is not decoded, the piece holds no bytes."""
        label, own, image = sample.label, kept.get(sample.index), sample.image
        if own is not None and set(own["key"].to_pylist()) == {sample.key}:
            piece.kept[piece.add(sample.key, sample.index, label)] = own
            return
        problem = sample.problem or self._task.problem(sample, label)
        if problem is None:
            piece.add(sample.key, sample.index, label, image)
        else:
            piece.problems[piece.add(sample.key, sample.index, label)] = problem

    def _submit(self, batch: Batch) -> Running | None:
        """Start the task on the decoded samples, in the device's thread."""
        pixels_DHWC, batch.pixels_DHWC = batch.pixels_DHWC, None
        if pixels_DHWC is None:
            return None
        labels = [-1 if label is None else label for label in map(batch.labels.__getitem__, batch.decoded)]
        seeds = [zlib.crc32(f"{self.config.seed}/{batch.keys[at]}".encode()) for at in batch.decoded]
        inputs = [pixels_DHWC, torch.tensor(labels), torch.tensor(seeds)]
        if self._device.type == "cuda":
            inputs = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in inputs]
        return self._compute.submit(self._run, *inputs)

    def _run(self, *inputs: torch.Tensor) -> list[Pending | None]:
        """Run the task. If memory runs out, halve the batch for the rest of this process.

        Returns:
            The results of each part of the batch; None for an image that does not fit in memory alone.
        """
        self._take(inputs)
        while True:
            try:
                parts = zip(*(torch.split(tensor, self._chunk) for tensor in inputs), strict=True)
                with self._arithmetic():
                    return [self._part(*part) for part in parts]
            except (RuntimeError, MemoryError) as error:
                if self._chunk == 1 or not out_of_memory(error):
                    raise
                self._chunk //= 2
            torch.cuda.empty_cache()

    def _take(self, inputs: Sequence[torch.Tensor]) -> None:
        """Wait on the device for inputs that the default stream joined, and keep their memory until they are used."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(torch.cuda.default_stream(self._device))
            for tensor in inputs:
                if tensor.is_cuda:
                    tensor.record_stream(stream)

    def _part(self, *part: torch.Tensor) -> Pending | None:
        try:
            return self._task(*part)
        except (RuntimeError, MemoryError) as error:
            if self._chunk > 1 or not out_of_memory(error, alone=True):
                raise
            torch.cuda.empty_cache()
            return None

    def _write(self, writer: ShardWriter, shard: Shard, batch: Batch, running: Running | None, tally: Tally) -> None:
        explained = None
        if running is not None:
            parts = [None if pending is None else pending.wait() for pending in running.result()]
            self._refuse(batch, parts)
            fitting = [part for part in parts if part is not None]
            tally.seconds["compute"] += sum(seconds for _, seconds in fitting)
            explained = Explained.concatenate([part for part, _ in fitting]) if fitting else None
        with self._outlet.writing(tally):
            rows = self._task.rows(shard, batch, explained)
            writer.write(rows)
        tally.count(len(batch), rows)
        self.images[shard.name] += len(batch)

    def _refuse(self, batch: Batch, parts: Sequence[object]) -> None:
        """Give the images that did not fit in memory their status. Each was a part of its batch."""
        if None in parts:
            side = self.config.preprocess.crop
            reason = f"one image of {side} x {side} does not fit in the memory of {self._device}"
            batch.refuse([slot for slot, part in enumerate(parts) if part is None], (OUT_OF_MEMORY, reason))
