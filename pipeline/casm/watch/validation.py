"""Measure a training while it runs: LE, F1 and top-1 on validation shards, and a page of sample masks.

Rows are made as `extract` makes them and judged as `evaluate` judges them, so all three give a checkpoint the same
numbers.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch

from saltern.pipeline.casm.algorithm.step import Average, Training
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.casm.watch.epochs_page import epochs_page, keep_masks
from saltern.pipeline.casm.watch.live import LiveMasks
from saltern.pipeline.casm.watch.mask_page import Chosen, mask_page
from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.metrics.judge import AS_IS, scores, truth_of
from saltern.pipeline.metrics.mean import Mean
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.files import write
from saltern.pipeline.training.whole import Whole, check_boxes
from saltern.schemas.config import Preprocess
from saltern.schemas.run import Shard

LINES = "validation.jsonl"
WRITTEN = (".html", ".npz")  # endings of the files of a step in masks/; others there are the user's
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
        check_boxes(self.shards)

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
        live, chosen = LiveMasks(training, self.preprocess, self.class_numbers), Chosen()
        means, in_play = {name: Mean() for name in _MEASURED}, frozenset(self.class_numbers)
        offer = chosen.offer if self.rank == 0 else lambda shard, sample: None
        with contextlib.closing(self._whole().batches(offer)) as batches:
            for shard, samples, batch in batches:
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
            if file.stem.isdecimal() and int(file.stem) > start and file.suffix in WRITTEN:
                file.unlink()

    def _whole(self) -> Whole:
        size, threads = self.batch_size, self.threads
        return Whole(self.shards, self.preprocess, size, threads, self.rank, self.world, self.labels)

    def _write(self, line: dict[str, float], live: LiveMasks, chosen: Chosen) -> None:
        step = int(line["step"])
        self._write_lines([*(old for old in curves.read(self.root / LINES) if old["step"] < step), line])
        shown = [(sample, live(shard, batch)[0]) for shard, sample, batch in self._whole().each(chosen.samples())]
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


def _add(
    means: dict[str, Mean], samples: Sequence[Sample], batch: Batch, rows: Sequence[Row], in_play: frozenset[int]
) -> None:
    """Judge the rows of a batch, and add the results to the means."""
    for at, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        with contextlib.suppress(ValueError):
            if (truth := truth_of(sample, row)) is not None:
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
