"""Measure how well masks find objects of classes that no classifier was trained on (Zolna 2020, section 5.4).

The classes are split into A to F. CASM is trained on F, E+F, D-F, C-F and B-F, and each training's masks are judged
on every subset by LE, the localization error. No training includes A.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from saltern.pipeline.casm.training.plan import make_plan
from saltern.pipeline.casm.training.train import TrainRequest, print_to_stderr, train
from saltern.pipeline.casm.unseen.split import SUBSETS, Split, check_val, make_split
from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.engine.derived import StoppedError
from saltern.pipeline.extract.extraction import extract
from saltern.pipeline.machine import pick_device
from saltern.pipeline.masknet.checkpoint import Checkpoints
from saltern.pipeline.metrics.evaluate import EvaluateRequest, evaluate
from saltern.pipeline.metrics.mean import Mean
from saltern.pipeline.metrics.subjects import read_shard
from saltern.pipeline.naming import brief
from saltern.pipeline.runs.datafile import reading_data
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.storage.ahead import read_ahead
from saltern.pipeline.storage.files import write
from saltern.pipeline.storage.store import Store
from saltern.pipeline.tables import markdown_table
from saltern.pipeline.training.request import differences
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import CENTRE, FOUND, RANDOM, WHOLE
from saltern.schemas.run import Shard

TRAININGS = {"F": "F", "EF": "E+F", "DEF": "D-F", "CDEF": "C-F", "BCDEF": "B-F"}  # subsets -> name in print
SEEN, UNSEEN = "seen", "unseen"
_BASELINES = {RANDOM: "random map", CENTRE: "centre box of half the area", WHOLE: "whole image"}
_KEPT = ("epochs", "steps_per_epoch", "batch_size", "side", "min_crop")  # of a request, in split.json

Say = Callable[[str], None]
Means = dict[str, Mean]  # of LE, by subset, and over seen and unseen classes


@dataclass
class Unseen:
    """The results of the experiment."""

    split: Split
    seed: int
    trained: dict[str, Means] = field(default_factory=dict)  # by the subsets trained on: keys of TRAININGS
    steps: dict[str, int] = field(default_factory=dict)  # of each training
    baselines: dict[str, Means] = field(default_factory=dict)  # of RANDOM, CENTRE and WHOLE

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON; LE in percent."""
        return {
            "metric": "LE %: no IoU of more than 0.5 with a true box; plus_minus is half the 95 % interval",
            "seed": self.seed,
            "classes": {name: len(classes) for name, classes in self.split.items()},
            "trained_on": [
                {
                    "subsets": list(subsets),
                    "classes": sum(len(self.split[name]) for name in subsets),
                    "steps": self.steps[subsets],
                    "le": {
                        name: _numbers(mean) | ({"seen": name in subsets} if name in SUBSETS else {})
                        for name, mean in means.items()
                    },
                }
                for subsets, means in self.trained.items()
            ],
            "baselines": {
                subject: {name: _numbers(mean) for name, mean in means.items()}
                for subject, means in self.baselines.items()
            },
        }

    def table(self) -> str:
        """Return a Markdown table: a row for each training, a column for each subset; a star marks subsets seen."""
        names = [*SUBSETS, SEEN, UNSEEN]
        rows = [
            [TRAININGS[subsets], *(_cell(means[name], name in subsets) for name in names)]
            for subsets, means in self.trained.items()
        ]
        for subject, means in self.baselines.items():
            rows.append([_BASELINES[subject], *(_cell(means[name]) for name in SUBSETS), "", ""])
        counts = {
            "classes": [len(self.split[name]) for name in SUBSETS],
            "samples": [self.baselines[WHOLE][name].count for name in SUBSETS],
        }
        rows += [[name, *(f"{number:,}" for number in numbers), "", ""] for name, numbers in counts.items()]
        return markdown_table(["LE %, trained on", *names], rows)

    def remarks(self) -> str:
        """Return one line about the samples of the table."""
        samples = sum(mean.count for mean in self.baselines[WHOLE].values())
        return f"{samples:,} samples with boxes; * trained on; ± half the 95 % interval; seed {self.seed}"


def unseen_classes(request: TrainRequest, val: Sequence[str], say: Say = print_to_stderr) -> Unseen:
    """Do the experiment, or resume it; finished trainings and extracted shards are kept.

    Writes in `request.out`: split.json, train-F to train-BCDEF, run-F to run-BCDEF, unseen.json, unseen.md.

    Args:
        request: of each training. Its `classes` are split (None: all in its shards), its `out` is the folder of the
            experiment, and its `resume` is ignored.
        val: shards with boxes, as patterns.

    Raises:
        UserError: the request cannot be met, or the folder holds another experiment, both found before any work; or a
            part of the experiment failed.
        KeyboardInterrupt: finished parts are kept.
    """
    root = Path(request.out).absolute()
    split = _split(request, val, root, say)
    result = Unseen(split, request.hyperparameters.seed)
    for number, (subsets, name) in enumerate(TRAININGS.items(), 1):
        classes = sorted(label for subset in subsets for label in split[subset])
        say(f"{number} of {len(TRAININGS)}: trained on {name}, {len(classes)} classes")
        training, run = root / f"train-{subsets}", root / f"run-{subsets}"
        result.steps[subsets] = _train(replace(request, out=str(training), classes=classes), say)
        _extract(request, val, training, run)
        means = _judge(run, val, split, subsets)
        result.trained[subsets] = means.pop(FOUND)
        result.baselines = means
    _write(root / "unseen.json", json.dumps(result.summary(), indent=1) + "\n")
    _write(root / "unseen.md", f"{result.table()}\n\n{result.remarks()}\n")
    return result


def _split(request: TrainRequest, val: Sequence[str], root: Path, say: Say) -> Split:
    """Check everything that the experiment needs, and return its split, which split.json keeps."""
    device = pick_device(request.device)
    plan = make_plan(replace(request, val=val), device, None, say)
    split = make_split(request.classes or sorted(set(plan.index.label_N.tolist())), request.hyperparameters.seed)
    config = {
        "model": request.model,
        **{key: plan.config[key] for key in ("weights_digest", "shards")},
        "val": [[shard.name, shard.size] for shard in plan.val],
        **{key: getattr(request, key) for key in _KEPT},
        "device": device,
        **asdict(request.hyperparameters),
        "thinning": request.hyperparameters.thinning.name,
        "subsets": split,
    }
    if any(root.glob("train-*/log.jsonl")):  # a training that was refused leaves only its folder
        _check_same(root, config)
    else:
        check_val(plan.val, split, plan.config["model_classes"], say, plan.val_labels)
        _write(root / "split.json", json.dumps(config, indent=1) + "\n")
    return split


def _check_same(root: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError if the folder holds another experiment."""
    path = root / "split.json"
    try:
        existing = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}); restore it, or give another --out") from error
    if differing := differences(existing, config):
        raise UserError(
            f"{root} holds another experiment: {differing}; repeat the options of that one, or give another --out"
        )


def _train(request: TrainRequest, say: Say) -> int:
    """Train, or resume, unless the training is finished, and return its steps."""
    newest = Checkpoints(Path(request.out)).newest(say)
    if newest is not None and newest.step == newest.config["steps"]:
        return newest.step
    return int(train(replace(request, resume=newest is not None), say).name)


def _extract(request: TrainRequest, val: Sequence[str], training: Path, run: Path) -> None:
    """Extract the masks for all of `val`, as `saltern extract --method casm` does."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results of the experiment
        result = extract(
            val, run, model=request.model, weights=request.weights, method="casm",
            options={"checkpoint": str(training)}, labels=request.labels,
            # All of a square image, so that no box is cropped away.
            resize=request.side, crop=request.side, squash=None if request.side is None else False,
            precision=request.hyperparameters.precision, seed=request.hyperparameters.seed,
            address=request.address, workers=request.workers if request.workers > 1 else None,
            gpus_per_worker=request.gpus_per_worker, device=request.device,
        )  # fmt: skip
    if result.code:
        raise UserError(f"{run} is incomplete, for the reasons above; repair them, and repeat the command to resume")


def _judge(run: Path, val: Sequence[str], split: Split, subsets: str) -> dict[str, Means]:
    """Return LE by subject and subset, of the samples whose class is in the split."""
    try:
        evaluation = evaluate(EvaluateRequest([str(run)], val, ["le"]), RunOptions(str(run), engine="local"))
    except StoppedError as stopped:
        raise KeyboardInterrupt from stopped
    for name, reason in evaluation.unread.items():
        raise UserError(f"{run}: the shard {name} cannot be judged: {reason}")
    judged = evaluation.runs[0].run
    subset_of = {label: name for name, classes in split.items() for label in classes}
    means = {subject: {name: Mean() for name in SUBSETS} for subject in (FOUND, *_BASELINES)}
    means[FOUND] |= {SEEN: Mean(), UNSEEN: Mean()}
    with closing(read_ahead(partial(_misses, judged), judged.shards)) as shards:
        for subject, label, miss in chain.from_iterable(shards):
            subset = subset_of.get(label) if label is not None else None
            if subset is not None:
                means[subject][subset].add(miss)
            if subset is not None and subject == FOUND:
                means[FOUND][SEEN if subset in subsets else UNSEEN].add(miss)
    return means


def _misses(run: SaliencyRun, shard: Shard) -> list[tuple[str, int | None, float | None]]:
    """Return subject, label and LE of each row of a shard's results."""
    with reading_data(run.store, run.run, shard) as file:
        columns = file.read(["index", "label"], use_threads=False).to_pydict()
    labels = dict(zip(columns["index"], columns["label"], strict=True))
    found = []
    for folder in ("localization", "localization-controls"):
        for subject, rows in read_shard(Store(f"{run.path}/metrics/{folder}"), shard, ["index", "le"]):
            if subject in (FOUND, *_BASELINES):
                found += [(subject, labels[row["index"]], row["le"]) for row in rows.to_pylist()]
    return found


def _numbers(mean: Mean) -> dict[str, Any]:
    return {**(mean.percent() or {}), "samples": mean.count}


def _cell(mean: Mean, seen: bool = False) -> str:
    percent = mean.percent()
    return "-" if percent is None else f"{percent['value']:.1f} ± {percent['plus_minus']:.1f}{' *' * seen}"


def _write(path: Path, text: str) -> None:
    try:
        write(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error}") from error
