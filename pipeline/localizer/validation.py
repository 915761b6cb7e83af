"""Measure a localizer on held-out shards, against the boxes that it learns from and the controls.

Rows are made as `extract --method localizer` makes them and judged as `evaluate` judges them.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saltern.pipeline.localizer.step import LocalizerTraining
from saltern.pipeline.methods import Method
from saltern.pipeline.methods.localizer import LocalizerMap
from saltern.pipeline.metrics.control_rows import BOXES, control_rows
from saltern.pipeline.metrics.judge import AS_IS, NO_MAPS, SCALED, box_scores, maps_of, scores, size_of, truth_of
from saltern.pipeline.metrics.localization.levels import LEVELS
from saltern.pipeline.metrics.localization.maxbox import IOUS
from saltern.pipeline.metrics.max_box import hits_of_rows
from saltern.pipeline.metrics.mean import Mean
from saltern.pipeline.runs.reader import Row, SaliencyRun, open_run
from saltern.pipeline.shards.annotations import Annotation
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.files import write
from saltern.pipeline.tables import markdown_table
from saltern.pipeline.training.live import LiveRows
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.trainee import Say
from saltern.pipeline.training.whole import Whole, check_boxes
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import RANDOM
from saltern.schemas.text import counted

LINES = "validation.jsonl"
MEASURED = {"le": "LE %", "om": "OM %", "f1": "F1 %", "max_box_acc": "MaxBoxAcc %", "max_box_acc_v2": "MaxBoxAccV2 %"}
LOCALIZER = "localizer"
_TOGETHER = 256  # rows whose maps are in memory together
Figures = dict[str, float | None]  # of MEASURED, in percent
_True = list[tuple[Row, Annotation]]  # rows with their true boxes


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

    def __call__(self, training: LocalizerTraining) -> dict[str, Any]:
        """Return step, the number of samples and MEASURED in percent: the same on every rank, which all call it."""
        sums = _Sums()
        live = LiveRows(
            _Live(training), training.device, self.preprocess, LocalizerMap.default_rule, range(self.classes)
        )
        shards = [self.run.tar(shard) for shard in self.run.shards]
        whole = Whole(
            shards, self.preprocess, self.batch_size, self.threads, self.ranks.rank, self.ranks.world,
            self.run.config.labels, self.run.config.members,
        )  # fmt: skip
        with contextlib.closing(whole.batches()) as batches:
            for shard, samples, batch in batches:
                pairs = zip(samples, live(shard, batch), strict=True)
                true = [(row, truth) for sample, row in pairs if (truth := _truth(sample, row)) is not None]
                sums.add([scores(row, truth, AS_IS) for row, truth in true], true)
        sums.gather(self.ranks, training.device)
        line = {"step": training.steps_done, **sums.percent(), "samples": sums.means["le"].count}
        if self.ranks.rank == 0:
            self._write([*(old for old in self._lines() if old["step"] < line["step"]), line])
            self.say(f"validation at step {line['step']:,}: LE {line['le']:.2f} %, F1 {line['f1']:.2f} %")
        return line

    def cut(self, start: int) -> None:
        """Remove the lines of steps after `start`, at which the training resumes; only on rank 0."""
        if self.ranks.rank == 0:
            self._write([line for line in self._lines() if line["step"] <= start])

    def figures(self) -> dict[str, Figures]:
        """Return MEASURED in percent, of the localizer's last validation, its teacher and the controls."""
        last = self._lines()[-1:]
        found = {LOCALIZER: {name: last[0].get(name) for name in MEASURED}} if last else {}
        return {**found, **self._others}

    def table(self, figures: dict[str, Figures]) -> str:
        """Return the figures as a Markdown table."""
        rows = [
            [name, *("-" if (value := values[m]) is None else f"{value:.1f}" for m in MEASURED)]
            for name, values in figures.items()
        ]
        samples = counted(sum(line["samples"] for line in self._lines()[-1:]), "sample")
        return markdown_table([f"{samples} with boxes", *MEASURED.values()], rows)

    @cached_property
    def _others(self) -> dict[str, Figures]:
        """The figures of the teacher's rows and of the controls.

        The random map has no box accuracies: its boxes at all thresholds take a second an image.
        """
        config, maps = self.run.config, maps_of(self.run.config)
        teacher = f"its teacher, {config.method} {config.discretize.text}"
        sums = {teacher: _Sums(maps != NO_MAPS), RANDOM: _Sums(has_maps=False), **{name: _Sums() for name in BOXES}}
        for true in self._stored():
            rows = [row for row, _ in true]
            sums[teacher].add([scores(row, truth, maps) for row, truth in true], true)
            read = sum(row.geometry is not None for row in rows)
            pixels_MHWC = torch.zeros(read, *rows[0].layout.input_shape, 3) if read else None  # only its shape counts
            noise = zip(control_rows(RANDOM, rows, pixels_MHWC, config), true, strict=True)
            sums[RANDOM].add([scores(row, truth, SCALED) for row, (_, truth) in noise], true)
            for name, box_of in BOXES.items():
                sizes = [size_of(row) or truth.size for row, truth in true]
                boxes = [box_of(*size) if size else None for size in sizes]
                judged = [box_scores(row, truth, box) for (row, truth), box in zip(true, boxes, strict=True)]
                shown = control_rows(name, rows, pixels_MHWC, config)
                sums[name].add(judged, [(row, truth) for row, (_, truth) in zip(shown, true, strict=True)])
        return {name: own.percent() for name, own in sums.items()}

    def _stored(self) -> Iterable[_True]:
        """Yield the run's rows that have true boxes, some at a time."""
        for shard in self.run.shards:
            pairs = ((rows[0], _truth(sample, rows[0])) for sample, rows in self.run.joined(shard))
            true = ((row, truth) for row, truth in pairs if truth is not None)
            while some := list(islice(true, _TOGETHER)):
                yield some

    def _lines(self) -> list[dict[str, Any]]:
        path = self.root / LINES
        try:
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it to go on without its lines") from error

    def _write(self, lines: list[dict[str, Any]]) -> None:
        write(self.root / LINES, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _truth(sample: Sample, row: Row) -> Annotation | None:
    """Return the true boxes of a sample; None if it has none that can be read."""
    try:
        return truth_of(sample, row)
    except ValueError:
        return None


@dataclass
class _Sums:
    """Sums over samples that give MEASURED, and that ranks can add up."""

    has_maps: bool = True
    means: dict[str, Mean] = field(default_factory=lambda: {name: Mean() for name in ("le", "om", "f1")})
    hits_IL: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(IOUS), LEVELS)))  # noqa: N815

    def add(self, judged: Sequence[Mapping[str, float | None]], true: _True) -> None:
        """Add rows, with what `scores` says of each."""
        for one in judged:
            for name, mean in self.means.items():
                mean.add(one[name])
        if self.has_maps and true:
            packed = b"".join(hits_of_rows([row for row, _ in true], [truth for _, truth in true]))
            hits_NIS = np.frombuffer(packed, np.uint8).reshape(len(true), len(IOUS), -1)
            self.hits_IL += np.unpackbits(hits_NIS, axis=2, count=LEVELS).sum(0)

    def gather(self, ranks: Ranks, device: torch.device) -> None:
        """Add the sums of all ranks, which all call it."""
        own = [[float(value) for value in astuple(mean)] for mean in self.means.values()]
        means, hits = torch.tensor(own, dtype=torch.float64), torch.from_numpy(self.hits_IL)
        sums = [means.to(device), hits.to(device)]
        ranks.average(sums)
        means, hits = (ranks.world * each.cpu() for each in sums)
        self.means = {
            name: Mean(round(count), *rest) for name, (count, *rest) in zip(self.means, means.tolist(), strict=True)
        }
        self.hits_IL = hits.numpy()

    def percent(self) -> Figures:
        """Return MEASURED in percent, the accuracies at their best thresholds; None if there is nothing to measure."""
        found: Figures = {name: 100 * mean.value if mean.count else None for name, mean in self.means.items()}
        samples = self.means["le"].count if self.has_maps else 0
        best_I = 100 * self.hits_IL.max(1) / max(samples, 1)
        accuracies = {"max_box_acc": float(best_I[0]), "max_box_acc_v2": float(best_I[1:].mean())}
        return {**found, **(accuracies if samples else dict.fromkeys(accuracies))}


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
