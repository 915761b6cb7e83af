"""The shard processor: built once for a device, then `shard -> Receipt`, any number of times, two at once.

read -> decode -> task -> write, each in threads of its own: a reader for each shard in flight, a pool that decodes,
one thread that owns the device (so that a batch's bits do not depend on what else runs), and the caller, who writes.
"""

import contextlib
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import cv2
import numpy as np
import pyarrow as pa
import torch

from saltern.pipeline.extract.task import Explained, Item, Pending, Task, device_losses
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.outlet import Outlet, Spec, Tally
from saltern.pipeline.runs.writer import ROW_GROUP, Row, ShardWriter, read_rows
from saltern.pipeline.shards.decode import Decoded, decode
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import RunConfig, Shard
from saltern.schemas.saliency import OK

__all__ = ["Processor", "Spec", "device_losses"]

AHEAD = 2  # batches explained before the oldest is written; as many again are being decoded

Running = Future[list[Pending]]


class Processor:
    """Takes shards through a resident classifier. `process` may run in two threads at once.

    Args:
        spec: of the run.
        task: what is done with the samples.

    Raises:
        UserError: the model, its weights or the method cannot be had here, or the weights are not the driver's.
    """

    def __init__(self, spec: Spec, task: Callable[[Spec, torch.device], Task]):
        self.config = spec.run.config
        self.images = 0  # samples whose rows were handed to a writer, for progress
        self._outlet = Outlet(spec)
        self._device = torch.device(spec.device)
        self._chunk = self.config.batch_size
        cv2.setNumThreads(1)  # its pool would fight with ours over small masks
        self._decoders = ThreadPoolExecutor(spec.decode_threads, "saltern-decode")
        # torch keeps its thread count for each calling thread: set it in the one that computes.
        self._compute = ThreadPoolExecutor(
            1, "saltern-device", lambda: torch.set_num_threads(self.config.torch_threads)
        )
        self._task = self._compute.submit(task, spec, self._device).result()

    def process(self, shard: Shard, redo: bool = False) -> Receipt:
        """Extract one shard: its data file, then its receipt, each whole or not at all.

        Args:
            shard: what to read.
            redo: keep the rows that are ok from the standing data file, do the others again.

        Raises:
            ShardError: the tar is broken as a whole.
            OSError: the world is broken (network, file gone); worth another try.
            OutputError: the run's folder takes no more.
            DeviceLostError: this process must be given up.
        """
        tally = Tally()
        kept = self._ok_rows(shard) if redo else {}
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
            written = self._outlet.close(shard, writer, tally)
        return self._outlet.hand_in(shard, written, tally, min(self._chunk, self.config.batch_size))

    def _batches(self, shard: Shard, kept: dict[int, list[Row]], tally: Tally) -> Generator[list[Item], None, None]:
        """Settled items in shard order, `batch_size` decoded ones at a time, so that no batch depends on time."""
        batch: list[Item] = []
        decoded = 0
        depth, longest = AHEAD * self.config.batch_size, max(ROW_GROUP, self.config.batch_size)
        with contextlib.closing(prefetch(lambda: self._items(shard, kept, tally), depth)) as items:
            for item in items:
                tally.seconds["decode"] += item.settle()
                batch.append(item)
                decoded += item.decoded is not None
                if decoded == self.config.batch_size or len(batch) == longest:
                    yield batch
                    batch, decoded = [], 0
        if batch:
            yield batch

    def _items(self, shard: Shard, kept: dict[int, list[Row]], tally: Tally) -> Iterator[Item]:
        """Samples as they are read, their decoding under way. Runs in the reader's thread."""
        samples = islice(read_samples(shard), shard.take)
        while True:
            with tally.phase("read"):
                sample = next(samples, None)
            if sample is None:
                return
            yield self._item(sample, kept)

    def _item(self, sample: Sample, kept: dict[int, list[Row]]) -> Item:
        if sample.index in kept:
            return Item(sample, kept=kept[sample.index])
        problem = sample.problem or self._task.problem(sample)
        if problem is not None or sample.image is None:
            return Item(sample, problem=problem)
        return Item(sample, self._decoders.submit(_decode, sample.image, self.config))

    def _submit(self, batch: list[Item]) -> Running | None:
        """Start explaining what was decoded, on the device's thread."""
        pixels = [item.decoded.pixels_HWC for item in batch if item.decoded is not None]
        if not pixels:
            return None
        samples = [item.sample for item in batch if item.decoded is not None]
        given = [
            torch.from_numpy(np.stack(pixels)),
            torch.tensor([-1 if sample.label is None else sample.label for sample in samples]),
            torch.tensor([zlib.crc32(f"{self.config.seed}/{sample.key}".encode()) for sample in samples]),
        ]
        if self._device.type == "cuda":
            given = [tensor.pin_memory() for tensor in given]
        return self._compute.submit(self._run, *given)

    def _run(self, *given: torch.Tensor) -> list[Pending]:
        """Where memory runs out, the batch is halved, for good."""
        while True:
            try:
                parts = zip(*(torch.split(tensor, self._chunk) for tensor in given), strict=True)
                with device_losses():
                    return [self._task(*part) for part in parts]
            except torch.OutOfMemoryError as error:
                if self._chunk == 1:
                    raise MemoryError("one image does not fit in the device's memory") from error
                self._chunk //= 2
            torch.cuda.empty_cache()

    def _write(
        self, writer: ShardWriter, shard: Shard, batch: list[Item], running: Running | None, tally: Tally
    ) -> None:
        found = None
        if running is not None:
            with device_losses():
                parts = [pending.wait() for pending in running.result()]
            tally.seconds["compute"] += sum(seconds for _, seconds in parts)
            found = Explained.concatenate([part for part, _ in parts])
        with self._outlet.writing(tally):
            rows = self._task.rows(shard, batch, found)
            writer.write(rows)
        tally.count(len(batch), rows)
        self.images += len(batch)

    def _ok_rows(self, shard: Shard) -> dict[int, list[Row]]:
        """Rows of the standing data file by sample, where all rows of the sample are ok."""
        raw = self._outlet.store.read(data_name(shard.name))
        rows = {} if raw is None else read_rows(pa.BufferReader(raw))
        return {index: found for index, found in rows.items() if all(row[-2] == OK for row in found)}


def _decode(data: bytes, config: RunConfig) -> tuple[Decoded, float]:
    since = time.perf_counter()
    decoded = decode(
        data, resize=config.resize, crop=config.crop, squash=config.squash, interpolation=config.interpolation
    )
    return decoded, time.perf_counter() - since
