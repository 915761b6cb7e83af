"""Measure a training while it runs: LE, F1 and top-1 on validation shards, and a page of sample masks.

Rows are made as `extract` makes them and judged as `evaluate` judges them, so all three give a checkpoint the same
numbers.
"""

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from saltern.pipeline.casm.algorithm.step import Average, Training
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.casm.watch.epochs_page import epochs_page, keep_masks
from saltern.pipeline.casm.watch.live import LiveRows
from saltern.pipeline.casm.watch.mask_page import Chosen, mask_page
from saltern.pipeline.extract.batch import Batch, Piece, join
from saltern.pipeline.metrics.judge import AS_IS, scores
from saltern.pipeline.metrics.mean import Mean
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import read_annotation
from saltern.pipeline.shards.decoder import Decoder, make_decoder
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, list_keys, read_samples
from saltern.pipeline.storage.files import write
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

LINES = "validation.jsonl"
AHEAD = 2  # batches decoded before they are needed
_Batch = tuple[Shard, Sequence[Sample], list[Piece]]  # with its samples
_MEASURED = ("le", "f1", "top1", "mask", "damaged")  # a mean of each, in [0, 1]


@dataclass(frozen=True, eq=False)
class Validation:
    """Measures a training on validation shards, at any step.

    Raises:
        UserError: a shard is broken or gone, or none of the samples has boxes.
    """

    shards: Sequence[Shard]  # tars with `jpg`, `cls`, and `json` with boxes; every rank reads all of them
    root: Path  # of the training; rank 0 writes validation.jsonl, masks/ and curves.png there
    preprocess: Preprocess  # interpolation, mean and std as in training
    class_numbers: Sequence[int]  # the model's numbers of the classes in play, in the order of the logits
    batch_size: int  # images of this rank
    threads: int  # that decode
    rank: int = 0  # decodes and measures sample i if i % world == rank
    world: int = 1
    average: Average = lambda tensors: None  # replaces tensors by their means over the ranks, in place
    say: Callable[[str], None] = lambda text: None  # takes a line for the user; rank 0 calls it
    labels: Mapping[int, int] | None = None  # the model's class for each number in `cls`; None: the same numbers

    def __post_init__(self) -> None:
        _check(self.shards)

    def __call__(self, training: Training) -> dict[str, float]:
        """Measure the training at its present step, on all ranks at once. Its next steps do not depend on this.

        A sample that cannot be decoded is a miss for LE, F1 and top-1. A sample without boxes, or with bad ones, counts
        only for top-1 and the masks' areas. A sample of a class that is not in play does not count for top-1.

        Returns:
            The same on every rank: step; le, f1, top1 in percent; mask_mean, mask_std of the masks' areas, in [0, 1];
            samples, with_boxes, in_play, damaged, which are numbers of samples. NaN for a mean of no samples.

        Raises:
            ShardError: a shard broke after the training began.
            OSError: a shard cannot be read now, or the root accepts no files.
        """
        live, chosen = LiveRows(training, self.preprocess, self.class_numbers), Chosen()
        means, in_play = {name: Mean() for name in _MEASURED}, frozenset(self.class_numbers)
        with (
            self._decoders() as pool,
            contextlib.closing(prefetch(lambda: self._batches(pool, chosen), AHEAD, _size)) as batches,
        ):
            for shard, samples, pieces in batches:
                batch = _joined(pieces)
                _add(means, samples, batch, live(shard, batch), in_play)
        # All ranks exchange their sums here.
        sums = torch.tensor([astuple(mean) for mean in means.values()], dtype=torch.float64, device=training.device)
        self.average([sums])
        means = {name: Mean(*row) for name, row in zip(means, sums.tolist(), strict=True)}
        line = _line(training.steps_done, means, self.world)
        if self.rank == 0:
            self._write(line, live, chosen)
        return line

    def cut(self, start: int) -> None:
        """Remove the lines and pages of steps after `start`, at which the training resumes; only on rank 0."""
        if self.rank:
            return
        if (self.root / LINES).exists():
            self._write_lines([line for line in curves.read(self.root / LINES) if line["step"] <= start])
        for file in (self.root / "masks").glob("*"):
            if file.stem.isdecimal() and int(file.stem) > start:
                file.unlink()

    def _decoders(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "saltern-decode")

    def _batches(self, pool: ThreadPoolExecutor, chosen: Chosen) -> Iterator[_Batch]:
        """Yield batches of this rank's samples, each of one shard, while their images are decoded."""
        numbers, decoder = count(), make_decoder(self.preprocess)
        for shard in self.shards:
            own = self._own(shard, numbers, chosen)
            while samples := list(islice(own, self.batch_size)):
                yield shard, samples, self._pieces(pool, decoder, samples)

    def _pieces(self, pool: ThreadPoolExecutor, decoder: Decoder, samples: Sequence[Sample]) -> list[Piece]:
        """Start to decode samples, a piece of them in each thread."""
        pieces, each = [], -(-len(samples) // self.threads)
        for start in range(0, len(samples), each):
            piece = Piece()
            for sample in samples[start : start + each]:
                at = piece.add(sample.key, sample.index, sample.label, None if sample.problem else sample.image)
                if sample.problem is not None:
                    piece.problems[at] = sample.problem
            pieces.append(piece.start(pool, decoder))
        return pieces

    def _own(self, shard: Shard, numbers: Iterator[int], chosen: Chosen) -> Generator[Sample, None, None]:
        for sample in read_samples(shard, self.labels):
            if self.rank == 0:
                chosen.offer(shard, sample)
            if next(numbers) % self.world == self.rank:
                yield sample

    def _write(self, line: dict[str, float], live: LiveRows, chosen: Chosen) -> None:
        step = int(line["step"])
        self._write_lines([*(old for old in curves.read(self.root / LINES) if old["step"] < step), line])
        with self._decoders() as pool:
            decoder = make_decoder(self.preprocess)
            started = [(shard, sample, self._pieces(pool, decoder, [sample])) for shard, sample in chosen.samples()]
            shown = [(sample, live(shard, _joined(pieces))[0]) for shard, sample, pieces in started]
        page = mask_page(line, shown, chosen.names, self.preprocess.mean)
        masks = self.root / "masks"
        write(masks / f"{step}.html", page.encode())
        keep_masks(masks, step, shown)
        write(masks / "epochs.html", epochs_page(masks, shown, chosen.names).encode())
        curves.draw(self.root)
        damaged = f", {line['damaged']:,.0f} of them damaged" if line["damaged"] else ""
        self.say(
            f"validation at step {step:,}: LE {line['le']:.2f} %, F1 {line['f1']:.2f} %, top-1 {line['top1']:.2f} %, "
            f"mean mask {line['mask_mean']:.2f} over {line['samples']:,.0f} samples{damaged}"
        )

    def _write_lines(self, lines: Sequence[dict[str, float]]) -> None:
        # JSON has no NaN.
        plain = [{key: None if math.isnan(value) else value for key, value in line.items()} for line in lines]
        write(self.root / LINES, "".join(json.dumps(line) + "\n" for line in plain).encode())


def _joined(pieces: Sequence[Piece]) -> Batch:
    """Wait for the pieces of a batch."""
    return join([piece.wait()[0] for piece in pieces])


def _add(
    means: dict[str, Mean], samples: Sequence[Sample], batch: Batch, rows: Sequence[Row], in_play: frozenset[int]
) -> None:
    """Judge the rows of a batch, and add the results to the means."""
    for at, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        with contextlib.suppress(ValueError):
            if (truth := read_annotation(sample)) is not None:
                judged = scores(row, truth, AS_IS)
                means["le"].add(judged["le"])
                means["f1"].add(judged["f1"])
        means["damaged"].add(at in batch.problems)
        if row.label in in_play:
            means["top1"].add(row.predicted == row.label)
        if row.map_bytes is not None:
            means["mask"].add(float(row.map().mean(dtype=np.float64)))


def _line(step: int, means: dict[str, Mean], world: int) -> dict[str, float]:
    """Return a line of validation.jsonl from the sums of all ranks, divided by their number."""
    return {
        "step": step,
        **{name: 100 * means[name].value for name in ("le", "f1", "top1")},
        "mask_mean": means["mask"].value,
        "mask_std": math.sqrt(means["mask"].variance),
        "samples": round(world * means["damaged"].count),
        "with_boxes": round(world * means["le"].count),
        "in_play": round(world * means["top1"].count),
        "damaged": round(world * means["damaged"].total),
    }


def _size(batch: _Batch) -> int:
    return sum(sample.size for sample in batch[1])


def _check(shards: Sequence[Shard]) -> None:
    try:
        for shard in shards:
            list_keys(shard)  # reads the tar to its end
        if not any(_has_boxes(sample) for shard in shards for sample in read_samples(shard)):
            raise UserError(
                "--val: none of the samples has boxes to judge by; `saltern pack --boxes` packs ILSVRC annotations as "
                "`boxes` of the json member"
            )
    except ShardError as error:
        raise UserError(f"--val: a shard is broken: {error}") from error
    except OSError as error:
        raise UserError(f"--val: a shard cannot be read: {error}") from error


def _has_boxes(sample: Sample) -> bool:
    try:
        return read_annotation(sample) is not None
    except ValueError:
        return False
