"""The shard processor. It is built once for a device, then called with any number of shards, two at a time.

read -> decode -> task -> write, each in its own threads: a reader for each shard in flight, a pool that decodes, one
thread that owns the device (so that a batch's bits do not depend on what else runs), and the caller, who writes.
"""

import contextlib
import hashlib
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pyarrow as pa
import torch

from saltern.pipeline.device import arithmetic
from saltern.pipeline.extract.task import Explained, Item, Pending, Task, device_losses, out_of_memory
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.runs.writer import ROW_GROUP, Record, ShardWriter, read_records
from saltern.pipeline.shards.decode import Decoded, decode
from saltern.pipeline.shards.decoder import make_decoder
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, content_of, fold, read_samples
from saltern.schemas.config import MethodConfig, Preprocess
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK, OUT_OF_MEMORY

AHEAD = 2  # batches explained before the oldest is written; as many again are being decoded

Running = Future[list[Pending | None]]
Decode = Callable[[bytes, Preprocess], Decoded]


class Processor:
    """A processor that runs a task on shards. `process` may run in two threads at once.

    Args:
        spec: of the run.
        task: processes the samples; built in the device's thread.
        decode: returns an image's pixels, or raises DecodeError.

    Raises:
        UserError: the model, its weights or the method are not available here, or the weights are not the run's.
    """

    def __init__(self, spec: Spec, task: Callable[[Spec, torch.device], Task], decode: Decode = decode):
        config = self.config = spec.run.config_of(MethodConfig)
        self._labels, self._members = config.labels, config.members
        self.images: dict[str, int] = {}  # samples handed to a writer, by shard in process, for the progress line
        self._outlet = Outlet(spec)
        self._retry_failed, self._decode = spec.retry_failed, decode
        self._device = torch.device(spec.device)
        self._chunk = self.config.batch_size
        cv2.setNumThreads(1)  # OpenCV's threads would compete with ours over small masks
        self._decoder = make_decoder(config.preprocess, config.decoder, spec.device, spec.decode_threads)
        self._decoders = ThreadPoolExecutor(spec.decode_threads, "saltern-decode")
        # torch keeps a thread count for each calling thread: set it in the one that computes.
        self._compute = ThreadPoolExecutor(
            1, "saltern-device", lambda: torch.set_num_threads(self.config.torch_threads)
        )
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
            OutputError: the run's folder accepts no more data.
            DeviceLostError: this process cannot be used any more.
        """
        self.images[shard.name] = 0
        try:
            return self._process(shard, earlier)
        finally:
            del self.images[shard.name]

    def close(self) -> None:
        """Release threads, hooks and device memory. No shard is in process."""
        self._decoders.shutdown()
        self._compute.submit(self._release).result()
        self._compute.shutdown()

    def _build(self, task: Callable[[Spec, torch.device], Task], spec: Spec) -> Task:
        with self._arithmetic(), device_losses():
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
        made = self._make(shard, self._ok_records(shard, earlier))
        return made if made.receipt.content == earlier.content else self._make(shard, {})

    def _make(self, shard: Shard, kept: dict[int, list[Record]]) -> Made:
        tally = Tally()
        with (
            self._outlet.open(self._task.schema, tally) as writer,
            contextlib.closing(self._batches(shard, kept, tally)) as batches,
        ):
            pending: deque[tuple[list[Item], Running | None]] = deque()
            for batch in batches:
                pending.append((batch, self._submit(batch)))
                if len(pending) > AHEAD:
                    self._write(writer, shard, *pending.popleft(), tally)
            while pending:
                self._write(writer, shard, *pending.popleft(), tally)
            return self._outlet.close(shard, writer, tally, min(self._chunk, self.config.batch_size))

    def _ok_records(self, shard: Shard, earlier: Receipt) -> dict[int, list[Record]]:
        """Return the existing records of the samples whose records are all ok, by the sample's index.

        There are none if the data file is not the receipt's, or if the receipt does not tell what the tar held.
        """
        raw = self._outlet.store.read(data_name(shard.name))
        if raw is None or earlier.content is None or hashlib.sha256(raw).hexdigest() != earlier.digest:
            return {}
        records = read_records(pa.BufferReader(raw))
        return {index: own for index, own in records.items() if all(record["status"] == OK for record in own)}

    def _batches(self, shard: Shard, kept: dict[int, list[Record]], tally: Tally) -> Generator[list[Item], None, None]:
        """Yield decoded items in shard order. Every batch but the last has `batch_size` images, whatever the timing."""
        batch: list[Item] = []
        decoded = 0
        depth, longest = AHEAD * self.config.batch_size, max(ROW_GROUP, self.config.batch_size)
        read = prefetch(lambda: self._items(shard, kept, tally), depth, lambda item: item.sample.size)
        with contextlib.closing(read) as items:
            for item in items:
                tally.seconds["decode"] += item.wait()
                batch.append(item)
                decoded += item.decoded is not None
                if decoded == self.config.batch_size or len(batch) == longest:
                    yield batch
                    batch, decoded = [], 0
        if batch:
            yield batch

    def _items(self, shard: Shard, kept: dict[int, list[Record]], tally: Tally) -> Iterator[Item]:
        """Yield samples as they are read, and start to decode them. Runs in the reader's thread."""
        samples = read_samples(shard, self._labels, named=self._members, as_listed=True)
        tally.content = 0
        while True:
            with tally.phase("read"):
                sample = next(samples, None)
                if sample is None:
                    return
                tally.content = fold(tally.content, sample)
            yield self._item(sample, kept)

    def _item(self, sample: Sample, kept: dict[int, list[Record]]) -> Item:
        own = kept.get(sample.index, [])
        if own and all(record["key"] == sample.key for record in own):
            sample.release()
            return Item(sample, kept=own)
        problem = sample.problem or self._task.problem(sample)
        if problem is not None or sample.image is None:
            sample.release()
            return Item(sample, problem=problem)
        return Item(sample, self._decoders.submit(_timed, self._decode, sample, self.config.preprocess))

    def _submit(self, batch: list[Item]) -> Running | None:
        """Start the task on the decoded items, in the device's thread."""
        pixels = [item.decoded.pixels_HWC for item in batch if item.decoded is not None]
        if not pixels:
            return None
        samples = [item.sample for item in batch if item.decoded is not None]
        inputs = [
            torch.from_numpy(np.stack(pixels)),
            torch.tensor([-1 if sample.label is None else sample.label for sample in samples]),
            torch.tensor([zlib.crc32(f"{self.config.seed}/{sample.key}".encode()) for sample in samples]),
        ]
        if self._device.type == "cuda":
            inputs = [tensor.pin_memory() for tensor in inputs]
        return self._compute.submit(self._run, *inputs)

    def _run(self, *inputs: torch.Tensor) -> list[Pending | None]:
        """Run the task. If memory runs out, halve the batch for the rest of this process.

        Returns:
            The results of each part of the batch; None for an image that does not fit in memory alone.
        """
        while True:
            try:
                parts = zip(*(torch.split(tensor, self._chunk) for tensor in inputs), strict=True)
                with self._arithmetic(), device_losses():
                    return [self._part(*part) for part in parts]
            except RuntimeError as error:
                if self._chunk == 1 or not out_of_memory(error):
                    raise
                self._chunk //= 2
            torch.cuda.empty_cache()

    def _part(self, *part: torch.Tensor) -> Pending | None:
        try:
            return self._task(*part)
        except RuntimeError as error:
            if self._chunk > 1 or not out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            return None

    def _write(
        self, writer: ShardWriter, shard: Shard, batch: list[Item], running: Running | None, tally: Tally
    ) -> None:
        explained = None
        if running is not None:
            with device_losses():
                parts = [None if pending is None else pending.wait() for pending in running.result()]
            self._refuse(batch, parts)
            fitting = [part for part in parts if part is not None]
            tally.seconds["compute"] += sum(seconds for _, seconds in fitting)
            explained = Explained.concatenate([part for part, _ in fitting]) if fitting else None
        with self._outlet.writing(tally):
            records = self._task.records(shard, batch, explained)
            writer.write(records)
        tally.count(len(batch), records)
        self.images[shard.name] += len(batch)

    def _refuse(self, batch: list[Item], parts: Sequence[object]) -> None:
        """Give the images that did not fit in memory their status. Each was a part of its batch."""
        if None in parts:
            side = self.config.preprocess.crop
            reason = f"one image of {side} x {side} does not fit in the memory of {self._device}"
            decoded = (item for item in batch if item.decoded is not None)
            for item, part in zip(list(decoded), parts, strict=True):
                if part is None:
                    item.decoded, item.problem = None, (OUT_OF_MEMORY, reason)


def _timed(decode: Decode, sample: Sample, preprocess: Preprocess) -> tuple[Decoded, float]:
    """Return the decoded image and the seconds. The sample's bytes are not needed any more."""
    since = time.perf_counter()
    try:
        decoded = decode(sample.image or b"", preprocess)
    finally:
        sample.release()
    return decoded, time.perf_counter() - since
