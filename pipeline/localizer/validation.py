"""Measure a localizer on held-out shards, against the boxes that it learns from and the controls.

Rows are made as `extract --method localizer` makes them and judged as `evaluate` judges them.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltern.pipeline.localizer.step import LocalizerTraining
from saltern.pipeline.methods import Method
from saltern.pipeline.methods.localizer import LocalizerMap
from saltern.pipeline.metrics.control_rows import BOXES
from saltern.pipeline.metrics.judge import AS_IS, box_scores, maps_of, scores, size_of
from saltern.pipeline.metrics.mean import Mean
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.pipeline.shards.annotations import Annotation, read_annotation
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.files import write
from saltern.pipeline.tables import markdown_table
from saltern.pipeline.training.live import LiveRows
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.trainee import Say
from saltern.pipeline.training.whole import Whole, check_boxes
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError

LINES = "validation.jsonl"
MEASURED = ("le", "f1")
LOCALIZER = "localizer"


def held_out(path: str, trained: SaliencyRun) -> SaliencyRun:
    """Return the run to validate on.

    Raises:
        UserError: it is of another method than the run to learn from, shares shards with it, or its shards lack boxes.
    """
    run = open_run(path)
    for name in ("method", "discretize"):
        here, there = (getattr(each.config, name) for each in (run, trained))
        if here != there:
            raise UserError(
                f"--val {path} has {name} {getattr(here, 'text', here)}, and {trained.path} has "
                f"{getattr(there, 'text', there)}: give a run that was made like the one to learn from"
            )
    common = {shard.url for shard in run.shards} & {shard.url for shard in trained.shards}
    if common:
        raise UserError(f"--val {path} has the shard {min(common)}, which is trained on; give a run of other shards")
    check_boxes([run.tar(shard) for shard in run.shards])
    return run


@dataclass(frozen=True, eq=False)
class Validation:
    """Measures a training on the samples of a run, at any step."""

    run: SaliencyRun
    root: Path  # of the training; rank 0 writes validation.jsonl there
    preprocess: Preprocess
    batch_size: int  # images of this rank
    threads: int  # that decode
    ranks: Ranks
    say: Say
    classes: int  # of the model

    def __call__(self, training: LocalizerTraining) -> dict[str, float]:
        """Return step, le and f1 in percent, and the number of samples: the same on every rank, which all call it."""
        means = {name: Mean() for name in MEASURED}
        live = LiveRows(
            _Live(training), training.device, self.preprocess, LocalizerMap.default_rule, range(self.classes)
        )
        shards = [self.run.tar(shard) for shard in self.run.shards]
        whole = Whole(
            shards, self.preprocess, self.batch_size, self.threads, self.ranks.rank, self.ranks.world,
            members=self.run.config.members,
        )  # fmt: skip
        with contextlib.closing(whole.batches()) as batches:
            for shard, samples, batch in batches:
                for sample, row in zip(samples, live(shard, batch), strict=True):
                    if (truth := _truth(sample)) is not None:
                        _add(means, scores(row, truth, AS_IS))
        sums = torch.tensor([astuple(mean) for mean in means.values()], dtype=torch.float64, device=training.device)
        self.ranks.average([sums])
        means = {name: Mean(*row) for name, row in zip(means, sums.tolist(), strict=True)}
        samples_all = round(self.ranks.world * means["le"].count)
        line = {"step": training.steps_done, **{n: 100 * m.value for n, m in means.items()}, "samples": samples_all}
        if self.ranks.rank == 0:
            self._write([*(old for old in self._lines() if old["step"] < line["step"]), line])
            self.say(f"validation at step {line['step']:,}: LE {line['le']:.2f} %, F1 {line['f1']:.2f} %")
        return line

    def cut(self, start: int) -> None:
        """Remove the lines of steps after `start`, at which the training resumes; only on rank 0."""
        if self.ranks.rank == 0:
            self._write([line for line in self._lines() if line["step"] <= start])

    def figures(self) -> dict[str, dict[str, float | None]]:
        """Return LE and F1 in percent, of the localizer's last validation, its teacher and the controls."""
        last = self._lines()[-1:]
        found = {LOCALIZER: {name: last[0][name] for name in MEASURED}} if last else {}
        return {**found, **self._others}

    def table(self, figures: dict[str, dict[str, float | None]]) -> str:
        """Return the figures as a Markdown table."""
        rows = [
            [name, *("-" if values[m] is None else f"{values[m]:.1f}" for m in MEASURED)]
            for name, values in figures.items()
        ]
        return markdown_table([f"{len(self.run):,} samples", "LE %", "F1 %"], rows)

    @cached_property
    def _others(self) -> dict[str, dict[str, float | None]]:
        """The figures of the teacher's rows and of the controls."""
        config, maps = self.run.config, maps_of(self.run.config)
        teacher = f"its teacher, {config.method} {config.discretize.text}"
        means = {name: {metric: Mean() for metric in MEASURED} for name in (teacher, *BOXES)}
        for shard in self.run.shards:
            for sample, rows in self.run.joined(shard):
                if (truth := _truth(sample)) is not None:
                    _add(means[teacher], scores(rows[0], truth, maps))
                    size = size_of(rows[0]) or truth.size
                    for name, box_of in BOXES.items():
                        _add(means[name], box_scores(rows[0], truth, box_of(*size) if size else None))
        return {
            name: {metric: 100 * mean.value if mean.count else None for metric, mean in by_metric.items()}
            for name, by_metric in means.items()
        }

    def _lines(self) -> list[dict[str, Any]]:
        path = self.root / LINES
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _write(self, lines: list[dict[str, Any]]) -> None:
        write(self.root / LINES, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _truth(sample: Sample) -> Annotation | None:
    """Return the true boxes of a sample; None if it has none that can be read."""
    try:
        return read_annotation(sample)
    except ValueError:
        return None


def _add(means: dict[str, Mean], judged: Mapping[str, float | None]) -> None:
    for name, mean in means.items():
        mean.add(judged[name])


class _Live(Method):
    """The map of a training's current networks."""

    needs_target = False
    default_map_dtype = "uint8"

    def __init__(self, training: LocalizerTraining) -> None:
        super().__init__(training.localizer.model)
        self._training = training

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            map_Bhw, logits_BK = self._training.localizer.predict(x_BCHW)
        return map_Bhw, logits_BK, None
