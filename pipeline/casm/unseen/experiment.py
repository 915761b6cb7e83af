"""How well masks find objects of classes that no classifier was trained on here (Zolna 2020, section 5.4).

The classes are split into A to F. CASM is trained on F, E+F, D-F, C-F and B-F, and each training's masks are judged
on every subset by LE, the localization error. A is never seen.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from saltern.pipeline.casm.data.index import make_index
from saltern.pipeline.casm.training.train import TrainRequest, print_to_stderr, train
from saltern.pipeline.casm.unseen.split import SUBSETS, Split, check_val, make_split
from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest
from saltern.pipeline.machine import pick_device, see_own_modules
from saltern.pipeline.masknet.checkpoint import Checkpoints
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.metrics.evaluate import Evaluation, Mean, evaluate
from saltern.pipeline.metrics.judge import CENTRE, FOUND, WHOLE
from saltern.pipeline.models import classifiers
from saltern.pipeline.naming import brief
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.storage.files import write
from saltern.schemas.errors import UserError

TRAININGS = {"F": "F", "EF": "E+F", "DEF": "D-F", "CDEF": "C-F", "BCDEF": "B-F"}  # subsets -> name in print
SEEN, UNSEEN = "seen", "unseen"
_BASELINES = {CENTRE: "centre box of half the area", WHOLE: "whole image"}
# Of a request: what stands in split.json by another name, and what changes no result.
_ELSEWHERE = {"shards", "out", "hyperparameters", "weights", "classes", "val", "device"} | {
    *("checkpoint_every", "decode_threads", "workers", "gpus_per_worker", "address", "resume")
}
_WIDE = 100  # characters of a value in an error

Say = Callable[[str], None]
Means = dict[str, Mean]  # of LE, by subset, and over seen and unseen classes


@dataclass
class Unseen:
    """What the experiment found."""

    split: Split
    seed: int
    trained: dict[str, Means] = field(default_factory=dict)  # by the subsets trained on: keys of TRAININGS
    steps: dict[str, int] = field(default_factory=dict)  # of each training
    baselines: dict[str, Means] = field(default_factory=dict)  # of judge.CENTRE and judge.WHOLE; nothing is seen

    def summary(self) -> dict[str, Any]:
        """All of it as JSON; LE in percent."""
        return {
            "metric": "LE %: no IoU of more than 0.5 with a true box; plus_minus is half the 95 % interval",
            "seed": self.seed,
            "classes": {name: len(classes) for name, classes in self.split.items()},
            "trained_on": [
                {
                    "subsets": list(subsets),
                    "classes": sum(len(self.split[name]) for name in subsets),
                    "steps": self.steps[subsets],
                    "le": {name: _numbers(mean) | _seen(name, subsets) for name, mean in means.items()},
                }
                for subsets, means in self.trained.items()
            ],
            "baselines": {
                subject: {name: _numbers(mean) for name, mean in means.items()}
                for subject, means in self.baselines.items()
            },
        }

    def table(self) -> str:
        """Markdown: what was trained on, downwards; subsets across, those that were seen marked with a star."""
        columns = [*SUBSETS, SEEN, UNSEEN]
        lines = [["LE %, trained on", *columns]]
        for subsets, means in self.trained.items():
            lines.append([TRAININGS[subsets], *(_cell(means[name], name in subsets) for name in columns)])
        for subject, means in self.baselines.items():
            lines.append([_BASELINES[subject], *(_cell(means[name]) if name in means else "" for name in columns)])
        samples = next(iter(self.baselines.values()))
        lines.append(["classes", *(f"{len(self.split[name]):,}" for name in SUBSETS), "", ""])
        lines.append(["samples", *(f"{samples[name].count:,}" for name in SUBSETS), "", ""])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        rows.insert(1, ["-" * width for width in widths])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def remarks(self) -> str:
        """What the table is over, in one line."""
        samples = sum(mean.count for mean in next(iter(self.baselines.values())).values())
        return f"{samples:,} samples with boxes; * trained on; ± half the 95 % interval; seed {self.seed}"


def unseen_classes(request: TrainRequest, val: Sequence[str], say: Say = print_to_stderr) -> Unseen:
    """Do the experiment, or go on with it: a training that is finished, and shards that were extracted, stay.

    Leaves in `request.out`: split.json, train-F to train-BCDEF, run-F to run-BCDEF, unseen.json, unseen.md.

    Args:
        request: of each of the trainings; its `classes` are those that are split (None: all in its shards), its `out`
            is the folder of the experiment, and what it says of resuming does not count.
        val: shards with boxes, as patterns.

    Raises:
        UserError: anything that was asked for cannot be had, or the folder holds another experiment: before any work.
        KeyboardInterrupt: what stands is kept.
    """
    root = Path(request.out).absolute()
    split = _planned(request, val, root, say)
    found = Unseen(split, request.hyperparameters.seed)
    for number, (subsets, name) in enumerate(TRAININGS.items(), 1):
        classes = sorted(label for subset in subsets for label in split[subset])
        say(f"{number} of {len(TRAININGS)}: trained on {name}, {len(classes)} classes")
        folder, run = root / f"train-{subsets}", root / f"run-{subsets}"
        found.steps[subsets] = _trained(replace(request, out=str(folder), classes=classes), say)
        _extracted(request, val, folder, run)
        means = _judged(run, val, split)
        found.trained[subsets] = means[FOUND] | _sums(means[FOUND], subsets)
        found.baselines = {subject: means[subject] for subject in _BASELINES}
    _write(root / "unseen.json", json.dumps(found.summary(), indent=1) + "\n")
    _write(root / "unseen.md", f"{found.table()}\n\n{found.remarks()}\n")
    return found


# --- before any work


def _planned(request: TrainRequest, val: Sequence[str], root: Path, say: Say) -> Split:
    """The split, kept in the folder; all that can be wrong is found here, or by the first training's own checks."""
    device = pick_device(request.device)
    see_own_modules()
    shards, hints = expand(request.shards)
    judged, more_hints = expand(val)
    for hint in (*hints, *more_hints):
        say(hint)
    classifier = classifiers.load(request.model, request.weights, seed=request.hyperparameters.seed)
    if request.classes is not None:
        restrict(classifier.model, request.classes)
    index = make_index(shards, classifier.classes, request.classes)
    classes = request.classes or sorted({int(label) for label in index.label_N})
    split = make_split(classes, request.hyperparameters.seed)
    plan = {
        "model": request.model,
        "weights_digest": classifier.digest,
        "shards": [[shard.name, shard.size] for shard in shards],
        "val": [[shard.name, shard.size] for shard in judged],
        **{name: value for name, value in vars(request).items() if name not in _ELSEWHERE},
        "device": device,
        **asdict(request.hyperparameters),
        "thinning": request.hyperparameters.thinning.name,
        "subsets": split,
    }
    if not _stands(root, plan):  # or they were found good before
        check_val(judged, split, classifier.classes, say)
        _write(root / "split.json", json.dumps(plan, indent=1) + "\n")
    return split


def _stands(root: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the folder holds this experiment. Raises UserError where it holds another."""
    if not any(root.glob("train-*")):
        return False  # nothing was trained yet: a split binds no one
    path = root / "split.json"
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}); restore it, or give another --out") from error
    for key in {**plan, **there}:
        if there.get(key) != plan.get(key):
            old, new = (str(held.get(key))[:_WIDE] for held in (there, plan))
            raise UserError(
                f"{root} holds another experiment: {key}: {old} there, {new} asked for; ask for the same, or give "
                "another --out"
            )
    return True


# --- the parts of one row


def _trained(request: TrainRequest, say: Say) -> int:
    """Train, or go on, unless it is finished; returns the steps."""
    standing = Checkpoints(Path(request.out)).newest(say)
    if standing is None or standing.step < standing.config["steps"]:
        train(replace(request, resume=standing is not None), say)
        standing = Checkpoints(Path(request.out)).newest(say)
        assert standing is not None, "a training leaves a checkpoint"  # noqa: S101
    return standing.step


def _extracted(request: TrainRequest, val: Sequence[str], folder: Path, run: Path) -> None:
    """The masks for all of `val`, as `saltern extract --method casm` makes them."""
    wanted = ExtractRequest(
        shards=val,
        model=request.model,
        method="casm",
        weights=request.weights,
        options={"checkpoint": str(folder)},
        # With a side of its own, the network sees all of a square image: no box is cropped away.
        resize=request.side,
        crop=request.side,
        precision=request.hyperparameters.precision,
        seed=request.hyperparameters.seed,
    )
    with contextlib.redirect_stdout(sys.stderr):  # what it reports is no result of this job
        ended = conduct(
            extraction(wanted),
            RunOptions(
                out=str(run),
                address=request.address,
                workers=request.workers if request.workers > 1 else None,
                gpus_per_worker=request.gpus_per_worker,
                device=request.device,
            ),
        )
    if ended.code == 130:
        raise KeyboardInterrupt
    if ended.code:
        raise UserError(f"{run} is not whole, as said above; mend what failed, and the same command goes on from here")


def _judged(run: Path, val: Sequence[str], split: Split) -> dict[str, Means]:
    """LE by subject of judge.SUBJECTS and subset. Samples of other classes are left out."""
    found = evaluate(str(run), val, ["le"])
    for name, reason in found.unread.items():
        raise UserError(f"{run}: the shard {name} cannot be judged: {reason}")
    subset_of = {label: name for name, classes in split.items() for label in classes}
    labels = _labels(found)
    means = {subject: {name: Mean() for name in SUBSETS} for subject in (FOUND, *_BASELINES)}
    for shard in found.run.shards:
        path = found.run.store.full(f"metrics/localization/{shard.name}.parquet")
        for row in pq.read_table(path).to_pylist():
            subset = subset_of.get(labels[row["shard"], row["index"]])
            for subject, by_subset in means.items():
                if subset is not None:
                    by_subset[subset].add(row[f"{subject}_le"])
    return means


def _labels(found: Evaluation) -> dict[tuple[str, int], int]:
    """Class by shard and place of the sample."""
    columns = found.run.columns("shard", "index", "label").to_pydict()
    return dict(zip(zip(columns["shard"], columns["index"], strict=True), columns["label"], strict=True))


def _sums(means: Means, subsets: str) -> Means:
    """Over all samples of classes that were seen, and of those that were not."""
    sums = {SEEN: Mean(), UNSEEN: Mean()}
    for name, mean in means.items():
        into = sums[SEEN if name in subsets else UNSEEN]
        into.count += mean.count
        into.total += mean.total
        into.squares += mean.squares
    return sums


# --- as text


def _numbers(mean: Mean) -> dict[str, Any]:
    return {**(mean.percent() or {}), "samples": mean.count}


def _seen(name: str, subsets: str) -> dict[str, bool]:
    return {"seen": name in subsets} if name in SUBSETS else {}


def _cell(mean: Mean, seen: bool = False) -> str:
    percent = mean.percent()
    return "-" if percent is None else f"{percent['value']:.1f} ± {percent['plus_minus']:.1f}{' *' * seen}"


def _write(path: Path, text: str) -> None:
    try:
        write(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error}") from error
