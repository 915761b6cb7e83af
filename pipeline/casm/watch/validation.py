"""How good the masks are while a training goes on: LE, F1 and top-1 on validation shards, and a page of sample masks.

Rows are made as `extract` makes them and judged as `evaluate` judges them, so that both say the same of a checkpoint.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saltern.pipeline.casm.algorithm.step import Average, Training
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.casm.watch.mask_page import Chosen, mask_page
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.extract.extraction import REASONS, Storage
from saltern.pipeline.extract.task import Item, assemble
from saltern.pipeline.methods import Method
from saltern.pipeline.metrics.judge import AS_IS, Judged
from saltern.pipeline.runs.reader import Layout, Row
from saltern.pipeline.shards.annotations import read_annotation
from saltern.pipeline.shards.decode import Decoded, decode
from saltern.pipeline.shards.prefetch import prefetch
from saltern.pipeline.shards.samples import Sample, list_keys, read_samples
from saltern.pipeline.storage.files import write
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.rules import Rule, Target
from saltern.schemas.run import Shard

LINES = "validation.jsonl"
AHEAD = 2  # batches decoded before they are needed


class Validation:
    """What `validation(training)` measures, at any step.

    Args:
        shards: tars with `jpg`, `cls` and `json` with boxes; every rank reads them all, and decodes its share.
        root: of the training; takes validation.jsonl, masks/<step>.html and curves.png, of rank 0.
        side: of the network's input, pixels.
        resize: shorter side before the centre crop, pixels; None: `side`, so that nothing is cut of its length.
        interpolation, mean, std: as in training.
        class_numbers: the model's numbers of the classes in play, in the order of the logits; None: all.
        batch_size: images of this rank at a time.
        threads: that decode.
        rank, world: sample i is of rank i % world.
        average: replaces tensors by their means over the ranks, in place.
        say: takes a line for the user; of rank 0.

    Raises:
        UserError: a shard that is broken or gone, or no sample with a box in any of them.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        root: Path,
        *,
        side: int,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        class_numbers: Sequence[int] | None,
        batch_size: int,
        threads: int,
        resize: int | None = None,
        rank: int = 0,
        world: int = 1,
        average: Average = lambda tensors: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._shards, self._root, self._class_numbers = shards, root, class_numbers
        self._threads, self._rank, self._world, self._average, self._say = threads, rank, world, average, say
        self._layout = Layout("uint8", (side, side))  # as extract stores the maps of a mask network
        self._batch_size = batch_size
        self._preprocess = Preprocess(resize or side, side, False, interpolation, tuple(mean), tuple(std))
        _check(shards)

    def __call__(self, training: Training) -> dict[str, float]:
        """Measure the training as it stands; all ranks at once. It goes on as if it had not been called.

        A sample that cannot be decoded is a miss for LE, F1 and top-1. One without boxes (or with bad ones) counts for
        top-1 and the masks' areas alone, and one whose class is not in play for all but top-1.

        Returns:
            The same on every rank: step; le, f1, top1 in percent; mask_mean, mask_std of the masks' areas, in [0, 1];
            samples, with_boxes, in_play, damaged, which are numbers of samples. NaN for a mean of none.

        Raises:
            ShardError: a shard that broke since the training began.
            OSError: one that cannot be read now, or a root that takes no files.
        """
        network = _Network(self._preprocess, self._layout, training, self._class_numbers)
        sums, chosen = _Sums(), Chosen()
        with (
            ThreadPoolExecutor(self._threads, "saltern-decode") as pool,
            contextlib.closing(prefetch(lambda: self._batches(pool, chosen), AHEAD)) as batches,
        ):
            for shard, items in batches:
                sums.add(items, network.rows(shard, items), network.in_play)
        line = sums.line(training.steps_done, self._average, self._world, training.device)
        if self._rank == 0:
            self._write(line, network, chosen)
        return line

    def cut(self, start: int) -> None:
        """Remove what was written of steps later than `start`, from which the training goes on."""
        if self._rank:
            return
        lines = [line for line in curves.read(self._root / LINES) if line["step"] <= start]
        if (self._root / LINES).exists():
            write(self._root / LINES, "".join(map(_json, lines)).encode())
        for page in (self._root / "masks").glob("*.html"):
            if page.stem.isdecimal() and int(page.stem) > start:
                page.unlink()

    def _batches(self, pool: ThreadPoolExecutor, chosen: Chosen) -> Iterator[tuple[Shard, list[Item]]]:
        """This rank's samples, none of two shards together; their decoding is under way."""
        numbers = count()
        for shard in self._shards:
            own = self._own(shard, numbers, chosen)
            while batch := list(islice(own, self._batch_size)):
                yield shard, [self._item(pool, sample) for sample in batch]

    def _own(self, shard: Shard, numbers: Iterator[int], chosen: Chosen) -> Generator[Sample, None, None]:
        for sample in read_samples(shard):
            if self._rank == 0:
                chosen.offer(shard, sample)
            if next(numbers) % self._world == self._rank:
                yield sample

    def _item(self, pool: ThreadPoolExecutor, sample: Sample) -> Item:
        if sample.problem is not None or sample.image is None:
            return Item(sample, problem=sample.problem)
        return Item(sample, pool.submit(self._decode, sample.image))

    def _decode(self, data: bytes) -> tuple[Decoded, float]:
        return decode(data, self._preprocess), 0.0

    def _write(self, line: dict[str, float], network: "_Network", chosen: Chosen) -> None:
        step = int(line["step"])
        before = [old for old in curves.read(self._root / LINES) if old["step"] < step]
        write(self._root / LINES, "".join(map(_json, [*before, line])).encode())
        with ThreadPoolExecutor(self._threads, "saltern-decode") as pool:
            items = [(shard, self._item(pool, sample)) for shard, sample in chosen.samples()]
            shown = [(item.sample, network.rows(shard, [item])[0]) for shard, item in items]
        page = mask_page(line, shown, chosen.names, self._preprocess.mean)
        write(self._root / "masks" / f"{step}.html", page.encode())
        curves.draw(self._root)
        self._say(
            f"validation at step {step:,}: LE {line['le']:.2f} %, F1 {line['f1']:.2f} %, top-1 {line['top1']:.2f} %, "
            f"mean mask {line['mask_mean']:.2f} over {line['samples']:,.0f} samples"
            + f", {line['damaged']:,.0f} of them damaged"
            * (line["damaged"] > 0)
        )


class _Live(Method):
    """The masks of a training that goes on, as any method gives its maps."""

    needs_target = False

    def __init__(self, training: Training) -> None:
        super().__init__(training.classifier)
        self._training = training

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_BK, mask_B1hw = self._training.predict(x_BCHW)
        return mask_B1hw[:, 0], logits_BK, None


class _Network:
    """The training's networks as they stand: samples in, rows out."""

    def __init__(
        self, preprocess: Preprocess, layout: Layout, training: Training, class_numbers: Sequence[int] | None
    ) -> None:
        method = _Live(training)
        target, rule = Target.parse("label", 1), Rule.parse("mean:1")  # the defaults of extract
        self._explain = Explainer(
            method, training.device, preprocess, target=target, rule=rule, map_dtype=layout.map_dtype
        )
        self._layout = layout
        grey_BHWC = torch.full((1, *layout.input_shape, 3), 127, dtype=torch.uint8)
        found = self._explain(grey_BHWC, torch.zeros(1, dtype=torch.long)).wait()[0]
        self._grid: tuple[int, int] = found.columns["map"].shape[1:]
        self._numbers = np.array(range(method.last.logits_BK.shape[1]) if class_numbers is None else class_numbers)
        self.in_play = frozenset(self._numbers.tolist())

    def rows(self, shard: Shard, items: Sequence[Item]) -> list[Row]:
        """A row for each sample, as `extract` would store it; its decoding is waited for."""
        for item in items:
            item.wait()
        pixels = [item.decoded.pixels_HWC for item in items if item.decoded is not None]
        found = None
        if pixels:
            found = self._explain(
                torch.from_numpy(np.stack(pixels)), torch.zeros(len(pixels), dtype=torch.long)
            ).wait()[0]
            found.columns["predicted"] = self._numbers[found.columns["predicted"]]
        storage = Storage(self._grid, True, self._layout.input_shape)
        records = assemble(shard, items, found, storage.describe, REASONS)
        return [self._read_back(Row.from_record(self._layout, record)) for record in records]

    @staticmethod
    def _read_back(row: Row) -> Row:
        """Parquet keeps the geometry as float32."""
        if row.geometry is None:
            return row
        return replace(row, geometry=np.asarray(row.geometry, np.float32).tolist())


@dataclass
class _Sums:
    """Of one rank, or the means of these over all ranks: the ratio of two is the same."""

    samples: float = 0
    damaged: float = 0
    with_boxes: float = 0
    missed: float = 0
    f1: float = 0
    in_play: float = 0
    right: float = 0
    masks: float = 0
    area: float = 0
    square: float = 0

    def add(self, items: Sequence[Item], rows: Sequence[Row], in_play: frozenset[int]) -> None:
        judged = Judged(AS_IS)
        for item, row in zip(items, rows, strict=True):
            judged.add(item.sample, [row])
            self.samples += 1
            self.damaged += item.decoded is None
            if row.label in in_play:
                self.in_play += 1
                self.right += row.predicted == row.label
            if row.map_bytes is not None:
                area = float(row.map().mean(dtype=np.float64))
                self.masks, self.area, self.square = self.masks + 1, self.area + area, self.square + area * area
        self.with_boxes += len(judged.rows)
        self.missed += sum(row["found_le"] for row in judged.rows)
        self.f1 += sum(row["found_f1"] for row in judged.rows)

    def line(self, step: int, average: Average, world: int, device: torch.device) -> dict[str, float]:
        """Over all ranks; they exchange once."""
        sums = torch.tensor(astuple(self), dtype=torch.float64, device=device)
        average([sums])
        of = _Sums(*sums.tolist())
        mean = _ratio(of.area, of.masks)
        return {
            "step": step,
            "le": 100 * _ratio(of.missed, of.with_boxes),
            "f1": 100 * _ratio(of.f1, of.with_boxes),
            "top1": 100 * _ratio(of.right, of.in_play),
            "mask_mean": mean,
            "mask_std": math.sqrt(max(_ratio(of.square, of.masks) - mean * mean, 0.0)),
            **{name: round(world * getattr(of, name)) for name in ("samples", "with_boxes", "in_play", "damaged")},
        }


def _ratio(total: float, number: float) -> float:
    return total / number if number else math.nan


def _check(shards: Sequence[Shard]) -> None:
    try:
        for shard in shards:
            list_keys(shard)  # proves the tar whole
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


def _json(line: dict[str, float]) -> str:
    """A line of validation.jsonl; JSON has no NaN."""
    return json.dumps({key: None if math.isnan(value) else value for key, value in line.items()}) + "\n"
