"""The shard processor: built once for a device, then `shard -> Receipt`, any number of times, two at once.

read -> decode -> explain -> write, each in threads of its own: a reader for each shard in flight, a pool that decodes,
one thread that owns the device (so that a batch's bits do not depend on what else runs), and the caller, who writes.
"""

import contextlib
import errno
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import torch

from pipeline import classifiers
from pipeline.decode import Decoded, decode
from pipeline.explain import Explained, Explainer, Pending
from pipeline.manifest import data_name, publish_receipt
from pipeline.methods import build
from pipeline.prefetch import prefetch
from pipeline.rows import Item, Storage, assemble
from pipeline.shards import Sample, read_samples
from pipeline.store import Store
from pipeline.writer import ROW_GROUP, Row, ShardWriter, Written, read_rows
from schemas.errors import DeviceLostError, OutputError, UserError
from schemas.receipt import PHASES, Receipt
from schemas.run import UNMARKED, Run, RunConfig, Shard
from schemas.saliency import MISSING_LABEL, OK, table_schema, with_metadata

AHEAD = 2  # batches explained before the oldest is written; as many again are being decoded
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


Running = Future[list[Pending]]


@dataclass(frozen=True)
class Spec:
    """What a worker needs to build its processor. Travels to other machines."""

    run: Run
    root: str  # the run's folder
    scratch: str  # this session's folder for unfinished files
    device: str
    decode_threads: int


@dataclass
class Tally:
    """What one shard's receipt will say."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    statuses: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - since


class Processor:
    """Extracts shards with a resident classifier. `process` may run in two threads at once.

    Raises:
        UserError: the model, its weights or the method cannot be had here, or the weights are not the driver's.
    """

    def __init__(self, spec: Spec):
        self.config, self.fingerprint = spec.run.config, spec.run.fingerprint
        self.images = 0  # samples whose rows were handed to a writer, for progress
        self._store, self._scratch = Store(spec.root), Path(spec.scratch)
        if not self._store.local:
            self._scratch.mkdir(parents=True, exist_ok=True)  # the driver's lies on the driver's machine
        self._device = torch.device(spec.device)
        self._chunk = self.config.batch_size
        cv2.setNumThreads(1)  # its pool would fight with ours over small masks
        self._decoders = ThreadPoolExecutor(spec.decode_threads, "saltern-decode")
        # torch keeps its thread count for each calling thread: set it in the one that computes.
        self._compute = ThreadPoolExecutor(
            1, "saltern-device", lambda: torch.set_num_threads(self.config.torch_threads)
        )
        self._explain = self._compute.submit(self._build).result()
        self._schema, self._storage = self._layout(spec.run)

    def _build(self) -> Explainer:
        classifier = classifiers.load(self.config.model, self.config.weights, seed=self.config.seed)
        if classifier.digest != self.config.weights_digest:
            raise UserError(
                f"the weights of {self.config.model} on {socket.gethostname()} are not the run's "
                f"(digest {classifier.digest[:12]}, the run has {self.config.weights_digest[:12]}): "
                "give the same file everywhere with --weights, or seed your factory"
            )
        model = classifier.model.to(self._device)
        if self.config.precision != "fp32":
            model = model.to(memory_format=torch.channels_last)
        method = build(self.config.method, model, layer=next(iter(self.config.layer), None), **self.config.options)
        return Explainer(method, self.config, self._device)

    def _layout(self, run: Run) -> tuple[pa.Schema, Storage]:
        """The file's schema: the grid of the maps comes from explaining one grey image."""
        crop = self.config.crop
        grey_BHWC = torch.full((1, crop, crop, 3), 127, dtype=torch.uint8)
        pending = self._compute.submit(self._explain, grey_BHWC, torch.zeros(1, dtype=torch.long)).result()
        stored = pending.wait()[0].columns.get("map")
        shape = None if stored is None else (int(stored.shape[1]), int(stored.shape[2]))
        schema = table_schema(None if stored is None else stored[0].nbytes)
        config = {key: value for key, value in asdict(run.config).items() if key not in UNMARKED}
        provenance = {
            "fingerprint": run.fingerprint,
            "config": config,
            "versions": run.versions,
            "map_dtype": self.config.map_dtype,
            "map_shape": shape,
            "map_clip_quantile": self._explain.clip_quantile,
            "input_shape": [crop, crop],
            "mask_bit_order": "big",
        }
        storage = Storage("", shape, self.config.map_dtype == "uint8", (crop, crop))
        return with_metadata(schema, provenance), storage

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
        with self._writing(tally):
            writer = ShardWriter(self._scratch, self._schema)
        with writer, contextlib.closing(self._batches(shard, kept, tally)) as batches:
            pending: deque[tuple[list[Item], Running | None]] = deque()
            for batch in batches:
                pending.append((batch, self._submit(batch)))
                if len(pending) > AHEAD:
                    self._write(writer, shard, *pending.popleft(), tally)
            while pending:
                self._write(writer, shard, *pending.popleft(), tally)
            with self._writing(tally):
                written = writer.close()
                self._store.publish(written.path, data_name(shard.name))
        receipt = self._receipt(shard, written, tally)
        with self._writing(tally):
            publish_receipt(self._store, receipt, self._scratch)
        return receipt

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
        problem = sample.problem or self._label_problem(sample)
        if problem is not None or sample.image is None:
            return Item(sample, problem=problem)
        return Item(sample, self._decoders.submit(_decode, sample.image, self.config))

    def _label_problem(self, sample: Sample) -> tuple[str, str] | None:
        if self.config.target != "label" or not self._explain.method.needs_target:
            return None
        if sample.label is None:
            return MISSING_LABEL, "the target is the label, and the sample has no `cls` that is a number"
        if not 0 <= sample.label < self.config.classes:
            return MISSING_LABEL, f"label {sample.label} lies outside the model's classes 0..{self.config.classes - 1}"
        return None

    def _submit(self, batch: list[Item]) -> Running | None:
        """Start explaining what was decoded, on the device's thread."""
        pixels = [item.decoded.pixels_HWC for item in batch if item.decoded is not None]
        if not pixels:
            return None
        pixels_BHWC = torch.from_numpy(np.stack(pixels))
        labels = [item.sample.label for item in batch if item.decoded is not None]
        label_B = torch.tensor([-1 if label is None else label for label in labels])
        if self._device.type == "cuda":
            pixels_BHWC, label_B = pixels_BHWC.pin_memory(), label_B.pin_memory()
        return self._compute.submit(self._run, pixels_BHWC, label_B)

    def _run(self, pixels_BHWC: torch.Tensor, label_B: torch.Tensor) -> list[Pending]:
        """Where memory runs out, the batch is halved, for good."""
        while True:
            try:
                parts = zip(torch.split(pixels_BHWC, self._chunk), torch.split(label_B, self._chunk), strict=True)
                with _losses():
                    return [self._explain(*part) for part in parts]
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
            with _losses():
                parts = [pending.wait() for pending in running.result()]
            tally.seconds["compute"] += sum(seconds for _, seconds in parts)
            found = Explained.concatenate([part for part, _ in parts])
        with self._writing(tally):
            rows = assemble(batch, found, self._explain.rows_each, replace(self._storage, shard=shard.name))
            writer.write(rows)
        tally.samples += len(batch)
        tally.statuses.update(row[-2] for row in rows)
        self.images += len(batch)

    @contextlib.contextmanager
    def _writing(self, tally: Tally) -> Iterator[None]:
        try:
            with tally.phase("write"):
                yield
        except OSError as error:
            if error.errno in _FULL:
                raise OutputError(f"cannot write to {self._store.path}: {os.strerror(error.errno)}") from error
            raise

    def _ok_rows(self, shard: Shard) -> dict[int, list[Row]]:
        """Rows of the standing data file by sample, where all rows of the sample are ok."""
        raw = self._store.read(data_name(shard.name))
        rows = {} if raw is None else read_rows(pa.BufferReader(raw))
        return {index: found for index, found in rows.items() if all(row[-2] == OK for row in found)}

    def _receipt(self, shard: Shard, written: Written, tally: Tally) -> Receipt:
        return Receipt(
            shard=shard.name,
            size=shard.size,
            fingerprint=self.fingerprint,
            samples=tally.samples,
            rows=written.rows,
            statuses=dict(sorted(tally.statuses.items())),
            digest=written.digest,
            data_bytes=written.size,
            seconds={**tally.seconds, "total": time.perf_counter() - tally.started},
            worker=f"{socket.gethostname()}:{os.getpid()}",
            batch_size=min(self._chunk, self.config.batch_size),
        )


@contextlib.contextmanager
def _losses() -> Iterator[None]:
    """A CUDA error leaves the process unusable: said as what it means."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error) or "CUBLAS" in str(error):
            raise DeviceLostError(str(error).splitlines()[0]) from error
        raise


def _decode(data: bytes, config: RunConfig) -> tuple[Decoded, float]:
    since = time.perf_counter()
    decoded = decode(
        data, resize=config.resize, crop=config.crop, squash=config.squash, interpolation=config.interpolation
    )
    return decoded, time.perf_counter() - since
