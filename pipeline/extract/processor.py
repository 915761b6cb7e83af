"""The shard processor. It is built once for a device, then called with any number of shards, two at a time.

read -> decode -> task -> write, each in its own threads: a reader for each shard in flight, a pool that decodes, one
thread that owns the device (see compute.py), and the caller, who writes.
"""

import contextlib
import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, overload

import pyarrow as pa
import torch

from saltern.pipeline.device import faults
from saltern.pipeline.extract.batch import Batch, Cutter, Lot, Piece, View, lots
from saltern.pipeline.extract.compute import Computer, Parts, Running
from saltern.pipeline.extract.task import Explained, Task
from saltern.pipeline.runs.manifest import data_name
from saltern.pipeline.runs.outlet import Earlier, Made, MadeTogether, Outlet, Spec, Tally
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

Kept = dict[int, pa.RecordBatch]  # rows of an earlier run, by the index of their sample


@dataclass
class _Output:
    """The data file of one run that a shard is written to."""

    task: Task
    outlet: Outlet
    writer: ShardWriter
    tally: Tally
    kept: Kept
    written: int = 0  # samples


class Processor:
    """A processor that runs tasks on shards. `process` may run in two threads at once.

    Several runs that differ in their methods only can share it: samples are read and decoded once for all of them, and
    each run's data file has the bytes that it has with a processor of its own.

    Args:
        spec: of the run; of several, by name.
        task: builds the task of the run, or those of several by name; called in the device's thread.
        decoder: replaces that of the runs.

    Raises:
        UserError: the model, its weights or a method are not available here, or the weights are not the runs'.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Spec],
        task: Callable[[Any, torch.device], Task | Mapping[str, Task]],
        decoder: Decoder | None = None,
    ):
        specs = spec if isinstance(spec, Mapping) else {"": spec}
        configs = {name: each.run.config_of(MethodConfig) for name, each in specs.items()}
        first, config = next(iter(specs.values())), next(iter(configs.values()))
        self.config = config
        self._labels, self._members = config.labels, config.members
        self.images: dict[str, int] = {}  # samples handed to a writer, by shard in process, for the progress line
        self._outlets = {name: Outlet(each) for name, each in specs.items()}
        self._retry_failed = first.retry_failed
        self._decoder = decoder or make_decoder(config.preprocess, config.decoder, first.device, first.decode_threads)
        on_host = self._decoder.device.type == "cpu"
        threads, ahead = first.decode_threads if on_host else AHEAD, AHEAD * config.batch_size
        self._decoders = ThreadPoolExecutor(threads, "saltern-decode")
        # All threads have work before a batch is complete.
        self._piece = max(1, min(_PIECE_IMAGES, ahead // (2 * threads))) if on_host else config.batch_size
        self._depth = -(-ahead // self._piece)
        self._device = torch.device(first.device)

        def build() -> Mapping[str, Task]:
            tasks = task(spec, self._device)
            return tasks if isinstance(tasks, Mapping) else {"": tasks}

        self._computer = Computer(configs, self._device, build)

    @overload
    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made: ...
    @overload
    def process(self, shard: Shard, earlier: Mapping[str, Receipt | None]) -> MadeTogether: ...
    def process(self, shard: Shard, earlier: Earlier = None) -> Made | MadeTogether:
        """Process one shard into the scratch folder.

        Args:
            shard: the shard to read.
            earlier: its receipt; of several runs, those of the runs to make, by name. If a receipt was written for this
                very tar, it is confirmed, or with --retry-failed only the samples that are not ok are done again.

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
                if isinstance(earlier, Mapping):
                    return MadeTogether(self._process(shard, earlier))
                return self._process(shard, {"": earlier})[""]
        finally:
            del self.images[shard.name]

    def close(self) -> None:
        """Release threads, hooks and device memory. No shard is in process."""
        self._decoders.shutdown()
        self._computer.close()

    def _process(self, shard: Shard, earlier: Mapping[str, Receipt | None]) -> dict[str, Made]:
        known = {name: receipt for name, receipt in earlier.items() if receipt is not None}
        redone = {name: receipt for name, receipt in known.items() if self._retry_failed and receipt.failed}
        made: dict[str, Made] = {}
        if len(known) > len(redone):
            content = content_of(shard, named=self._members, as_listed=True)
            made = {
                name: Made(replace(receipt, mtime_ns=shard.mtime_ns), {})
                for name, receipt in known.items()
                if name not in redone and receipt.content == content
            }
        kept = {name: self._ok_rows(name, shard, receipt) for name, receipt in redone.items()}
        made |= self._make(shard, {name: kept.get(name, {}) for name in earlier if name not in made})
        changed = [name for name, receipt in redone.items() if made[name].receipt.content != receipt.content]
        return made | self._make(shard, {name: {} for name in changed})

    def _make(self, shard: Shard, kept: Mapping[str, Kept]) -> dict[str, Made]:
        """Make the data files of runs, by name, each with the rows that it keeps."""
        if not kept:
            return {}
        with contextlib.ExitStack() as stack:
            outputs = {name: self._open(name, rows, stack) for name, rows in kept.items()}
            shared = Tally()  # of reading and decoding
            batches = stack.enter_context(contextlib.closing(self._lots(shard, outputs, shared)))
            pending: deque[tuple[Lot, Running | None]] = deque()
            for lot in batches:
                pending.append((lot, self._submit(lot)))
                if len(pending) > AHEAD:
                    self._write(shard, outputs, *pending.popleft())
            while pending:
                self._write(shard, outputs, *pending.popleft())
            for output in outputs.values():
                output.tally.content = shared.content
                output.tally.seconds |= {name: shared.seconds[name] / len(outputs) for name in ("read", "decode")}
            return {name: self._close(shard, name, output) for name, output in outputs.items()}

    def _open(self, name: str, kept: Kept, stack: contextlib.ExitStack) -> _Output:
        task, outlet, tally = self._computer.tasks[name], self._outlets[name], Tally()
        return _Output(task, outlet, stack.enter_context(outlet.open(task.schema, tally)), tally, kept)

    def _close(self, shard: Shard, name: str, output: _Output) -> Made:
        batch_size = min(self._computer.chunk[name], self.config.batch_size)
        return output.outlet.close(shard, output.writer, output.tally, batch_size)

    def _ok_rows(self, name: str, shard: Shard, earlier: Receipt) -> Kept:
        """Return the existing rows of the samples whose rows are all ok, by the sample's index.

        There are none if the data file is not the receipt's, or if the receipt does not tell what the tar held.
        """
        raw = self._outlets[name].store.read(data_name(shard.name))
        if raw is None or earlier.content is None or hashlib.sha256(raw).hexdigest() != earlier.digest:
            return {}
        found = read_rows(pa.BufferReader(raw), self._computer.tasks[name].schema)
        return {index: own for index, own in found.items() if set(own["status"].to_pylist()) == {OK}}

    def _lots(self, shard: Shard, outputs: Mapping[str, _Output], tally: Tally) -> Generator[Lot, None, None]:
        """Yield decoded batches in shard order. Every one but the last has `batch_size` images, whatever the timing."""
        size = self.config.batch_size
        cutters = {name: Cutter(size, max(ROW_GROUP, size)) for name in outputs}
        read = prefetch(lambda: self._pieces(shard, outputs, tally), self._depth, lambda piece: piece.size)
        with contextlib.closing(read) as pieces:
            for piece in pieces:
                decoded, seconds = piece.wait()
                tally.seconds["decode"] += seconds
                own = zip(cutters.items(), decoded, strict=True)
                yield from lots({name: list(cutter.add(batch)) for (name, cutter), batch in own})
        yield from lots({name: list(cutter.rest()) for name, cutter in cutters.items()})

    def _pieces(self, shard: Shard, outputs: Mapping[str, _Output], tally: Tally) -> Iterator[Piece]:
        """Yield samples as they are read, and start to decode them. Runs in the reader's thread."""
        samples = read_samples(shard, self._labels, named=self._members, as_listed=True, shared=True)
        tally.content = 0
        while True:
            with tally.phase("read"):
                piece = Piece([View() for _ in outputs])
                for sample in samples:
                    tally.content = fold(tally.content, sample)
                    self._add(piece, sample, outputs)
                    if len(piece.images) == self._piece or len(piece) == ROW_GROUP or piece.size >= _PIECE_BYTES:
                        break
            if not len(piece):
                return
            yield piece.start(self._decoders, self._decoder)

    def _add(self, piece: Piece, sample: Sample, outputs: Mapping[str, _Output]) -> None:
        """Add a sample to a piece. Of one that no run decodes, the piece holds no bytes."""
        position, wanted, label = len(piece), False, sample.label
        for output, view in zip(outputs.values(), piece.views, strict=True):
            own = output.kept.get(sample.index)
            if own is not None and set(own["key"].to_pylist()) == {sample.key}:
                view.kept[position] = own
            elif problem := sample.problem or output.task.problem(sample, label):
                view.problems[position] = problem
            else:
                wanted = True
        piece.add(sample.key, sample.index, label, sample.shared_image if wanted else None)

    def _submit(self, lot: Lot) -> Running | None:
        """Start the tasks on the decoded samples, in the device's thread."""
        batch = next(iter(lot.values()))
        pixels_DHWC, batch.pixels_DHWC = batch.pixels_DHWC, None
        if pixels_DHWC is None:
            return None
        labels = [-1 if label is None else label for label in map(batch.labels.__getitem__, batch.decoded)]
        seeds = [zlib.crc32(f"{self.config.seed}/{batch.keys[at]}".encode()) for at in batch.decoded]
        return self._computer.submit(list(lot), pixels_DHWC, torch.tensor(labels), torch.tensor(seeds))

    def _write(self, shard: Shard, outputs: Mapping[str, _Output], lot: Lot, running: Running | None) -> None:
        results = {} if running is None else running.result()
        for name, batch in lot.items():
            output = outputs[name]
            explained = self._explained(batch, results[name], output.tally) if name in results else None
            with output.outlet.writing(output.tally):
                rows = output.task.rows(shard, batch, explained)
                output.writer.write(rows)
            output.tally.count(len(batch), rows)
            output.written += len(batch)
        self.images[shard.name] = min(output.written for output in outputs.values())

    def _explained(self, batch: Batch, results: Parts, tally: Tally) -> Explained | None:
        parts = [None if pending is None else pending.wait() for pending in results]
        self._refuse(batch, parts)
        fitting = [part for part in parts if part is not None]
        tally.seconds["compute"] += sum(seconds for _, seconds in fitting)
        return Explained.concatenate([part for part, _ in fitting]) if fitting else None

    def _refuse(self, batch: Batch, parts: Sequence[object]) -> None:
        """Give the images that did not fit in memory their status. Each was a part of its batch."""
        if None in parts:
            height, width = self.config.preprocess.shape
            reason = f"one image of {height} x {width} does not fit in the memory of {self._device}"
            batch.refuse([slot for slot, part in enumerate(parts) if part is None], (OUT_OF_MEMORY, reason))
