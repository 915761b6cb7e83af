"""Test the unseen-class experiment: its numbers against a recount, its resume after an interruption, bad input."""

import dataclasses
import json
import math
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from casm_toys import quiet
from typer.testing import CliRunner
from unseen_toys import SPLIT, STEPS, request, run, write_train, write_val

from saltern.jobs.main import app
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.training.train import TrainRequest
from saltern.pipeline.casm.unseen import experiment
from saltern.pipeline.casm.unseen.experiment import TRAININGS, unseen_classes
from saltern.pipeline.casm.unseen.split import make_split
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.engine.book import Book
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.training.batches import Batches
from saltern.schemas.errors import ShardError, UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

FIRST = dict(islice(TRAININGS.items(), 3))  # enough to interrupt one between others
TRAINED = ("log.jsonl", "checkpoints/*/tensors.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unseen")
    write_train(folder / "train")
    write_val(folder / "val")
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """Return the folder of an experiment without interruption. Tests must not change it."""
    out = tmp_path_factory.mktemp("unseen") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", lambda root: None)
        run(data, out)
    return out


# --- the numbers


def iou(found: list[int], true: list[int]) -> float:
    """Return the IoU of a half-open box and an inclusive one, counted pixel by pixel."""
    one = {(x, y) for x in range(found[0], found[2]) for y in range(found[1], found[3])}
    other = {(x, y) for x in range(true[0], true[2] + 1) for y in range(true[1], true[3] + 1)}
    return len(one & other) / len(one | other)


def recount(data: Path, run: Path, split: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    """Count misses and samples with boxes, by subset."""
    misses, samples = Counter(), Counter()
    for path in sorted((run / "data").glob("*.parquet")):
        rows = {row["key"]: row for row in pq.read_table(path).to_pylist()}
        with tarfile.open(data / "val" / f"{path.stem}.tar") as tar:
            for key, row in rows.items():
                true = json.load(tar.extractfile(f"{key}.json"))["boxes"]
                label = int(tar.extractfile(f"{key}.cls").read())
                for name, classes in split.items():
                    if label in classes and true:
                        samples[name] += 1
                        misses[name] += not any(iou(box, t) > 0.5 for box in row["boxes"] or [] for t in true)
    return {name: (misses[name], samples[name]) for name in split}


def check(numbers: dict, misses: int, samples: int) -> None:
    p = misses / samples
    assert numbers["samples"] == samples
    assert numbers["value"] == pytest.approx(100 * p)
    assert numbers["plus_minus"] == pytest.approx(196 * math.sqrt(p * (1 - p) / samples))


def test_le_on_every_subset_is_that_of_a_recount(data, undisturbed):
    found = json.loads((undisturbed / "unseen.json").read_text())
    split = json.loads((undisturbed / "split.json").read_text())["subsets"]
    assert split == make_split(range(SPLIT), 5)
    rates = set()
    for made, subsets in zip(found["trained_on"], ["F", "EF", "DEF", "CDEF", "BCDEF"], strict=True):
        assert made["subsets"] == list(subsets)
        assert made["steps"] == STEPS
        assert made["classes"] == sum(len(split[name]) for name in subsets)
        counted = recount(data, undisturbed / f"run-{subsets}", split)
        for name, (misses, samples) in counted.items():
            check(made["le"][name], misses, samples)
            assert made["le"][name]["seen"] == (name in subsets)
            rates.add(made["le"][name]["value"])
        for part, names in (("seen", subsets), ("unseen", set(split) - set(subsets))):
            misses, samples = (sum(counted[name][at] for name in names) for at in (0, 1))
            check(made["le"][part], misses, samples)
    assert len(rates) > 5  # the subsets have different numbers
    # In each shard, a sample of class 3 has no boxes. The damaged one of class 5 counts.
    assert sum(made["le"][name]["samples"] for name in split) == 3 * (2 * SPLIT - 1)
    assert list(found["baselines"]) == ["random", "centre-box", "whole-image"]
    assert found["baselines"]["centre-box"]["A"]["samples"] == made["le"]["A"]["samples"]


def test_each_training_knows_the_classes_of_its_subsets(undisturbed):
    split = json.loads((undisturbed / "split.json").read_text())["subsets"]
    for subsets in TRAININGS:
        seen = {label for name in subsets for label in split[name]}
        state = json.loads((undisturbed / f"train-{subsets}/checkpoints/{STEPS}/state.json").read_text())
        assert state["config"]["classes"] == sorted(seen)
        assert state["config"]["settings"]["thinning"] == "L"
        run = json.loads((undisturbed / f"run-{subsets}/run.json").read_text())["config"]
        assert run["checkpoint"] == str(undisturbed / f"train-{subsets}/checkpoints/{STEPS}")
        rows = pq.read_table(undisturbed / f"run-{subsets}/data").to_pydict()
        assert set(rows["predicted"]) - {None} <= seen


def test_the_table_marks_what_was_seen(undisturbed):
    lines = (undisturbed / "unseen.md").read_text().splitlines()
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:11])}
    assert cells["LE %, trained on"] == [*"ABCDEF", "seen", "unseen"]
    for name, marks in {"F": 1, "E+F": 2, "D-F": 3, "C-F": 4, "B-F": 5}.items():
        assert [cell.endswith(" *") for cell in cells[name]] == [False] * (6 - marks) + [True] * marks + [False] * 2
    assert cells["classes"][:6] == ["1", "1", "1", "2", "3", "2"]
    found = json.loads((undisturbed / "unseen.json").read_text())
    value = found["trained_on"][1]["le"]["D"]
    assert cells["E+F"][3] == f"{value['value']:.1f} ± {value['plus_minus']:.1f}"
    assert "57 samples with boxes" in lines[-1]


# --- resume


def trees(root: Path, subsets: Iterable[str] = TRAININGS) -> dict[str, object]:
    """Return what does not depend on the folder's path, of these trainings: files, JSON, and the cells of the table."""
    kept = ["split.json", *(f"train-{each}/{name}" for each in subsets for name in TRAINED)]
    found = {str(path.relative_to(root)): path.read_bytes() for glob in kept for path in sorted(root.glob(glob))}
    told = json.loads((root / "unseen.json").read_text())
    told["trained_on"] = [made for made in told["trained_on"] if "".join(made["subsets"]) in subsets]
    rows = [[cell.strip() for cell in line.split("|")] for line in (root / "unseen.md").read_text().splitlines()]
    others = [title for each, title in TRAININGS.items() if each not in subsets]
    rows = [row for row in rows if not row[1:] or row[1].strip("-") not in ("", *others)]
    return {**found, "unseen.json": told, "unseen.md": rows}


def test_an_interrupted_experiment_ends_as_an_undisturbed_one(data, undisturbed, tmp_path, monkeypatch):
    """Interrupt within the second training, then between its extraction and the third training."""
    begun = []
    real_step, real_train = Training.step, experiment.train

    def cut(self, *args):
        if len(begun) == 2 and self.steps_done == 3:
            raise KeyboardInterrupt
        return real_step(self, *args)

    def noted(wanted, say):
        begun.append((Path(wanted.out).name, wanted.resume))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return real_train(wanted, say)

    monkeypatch.setattr(experiment, "TRAININGS", FIRST)
    monkeypatch.setattr(experiment, "train", noted)
    monkeypatch.setattr(Training, "step", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "cut")
        assert not (tmp_path / "cut/unseen.json").exists()
    run(data, tmp_path / "cut")
    names = [("F", False), ("EF", False), ("EF", True), ("DEF", False), ("DEF", False)]
    assert begun == [(f"train-{name}", resume) for name, resume in names]
    assert trees(tmp_path / "cut") == trees(undisturbed, FIRST)
    assert len(trees(undisturbed)) == 3 + 5 + 10


def test_an_interrupted_extraction_is_resumed(data, undisturbed, tmp_path, monkeypatch):
    """Shards and trainings that are done are not repeated."""
    shutil.copytree(undisturbed, tmp_path / "cut", ignore=shutil.ignore_patterns("run-*", "unseen.*"))
    real, interrupts, done = Book.publish, [KeyboardInterrupt], []

    def publish(self, made):
        receipt = real(self, made)
        if "metrics" in Path(self.store.path).parts:  # of the evaluation
            return receipt
        done.append((Path(self.store.path).name, receipt.shard))
        if interrupts:
            raise interrupts.pop()
        return receipt

    monkeypatch.setattr(Book, "publish", publish)
    monkeypatch.setattr(experiment, "TRAININGS", FIRST)
    monkeypatch.setattr(experiment, "train", lambda *args: pytest.fail("a finished training was begun again"))
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "cut")
    run(data, tmp_path / "cut")
    # Once each. The shard in progress at the interrupt may have ended unnoticed.
    wanted = {(f"run-{subsets}", f"val-{shard}") for subsets in FIRST for shard in range(3)}
    assert len(done) == len(set(done))
    assert set(done) <= wanted
    assert len(wanted) - len(done) <= 1
    assert trees(tmp_path / "cut", FIRST) == trees(undisturbed, FIRST)


# --- requests that are refused before any training


def refused(match: str, wanted: TrainRequest, val: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "run", lambda *args: pytest.fail("a training was begun"))
        with pytest.raises(UserError, match=match) as error:
            unseen_classes(wanted, [str(val)], quiet)
    assert "\n" not in str(error.value)


def test_another_experiment_in_the_folder_is_refused(data, undisturbed, tmp_path):
    before = trees(undisturbed)
    wanted = request(data, undisturbed)
    for changed, match in (
        ({"batch_size": 8}, "batch_size: 4 there, 8 requested; repeat the options of that one, or give another --out"),
        ({"hyperparameters": dataclasses.replace(wanted.hyperparameters, seed=6)}, "seed: 5 there, 6 requested"),
        (
            {"hyperparameters": dataclasses.replace(wanted.hyperparameters, thinning=THINNINGS["F"])},
            "thinning: 'L' there, 'F' requested",
        ),
        ({"classes": range(9)}, "subsets: "),
        ({"side": 32}, "side: 64 there, 32 requested"),
    ):
        refused(match, dataclasses.replace(wanted, **changed), data / "val")
    write_val(tmp_path / "val", drop=11)
    refused("val: ", wanted, tmp_path / "val")
    assert trees(undisturbed) == before
    shutil.copytree(undisturbed, tmp_path / "lost")
    (tmp_path / "lost/split.json").write_text("{")
    refused("split.json cannot be read", request(data, tmp_path / "lost"), data / "val")


def test_val_shards_are_checked(data, tmp_path):
    split = make_split(range(SPLIT), 5)
    label = split["D"][0]
    for odd, match in (
        ({"drop": label}, rf"--val: no sample is of class {label} \(in D\); leave the class out by --classes, or give"),
        ({"boxless": label}, rf"--val: no sample with boxes is of class {label} \(in D\)"),
        ({"cls": "12", "jpg": ""}, r"'odd' is of class 12, out of range: the model has classes 0\.\.11"),
    ):
        refused(match, request(data, tmp_path / "out"), write_val(tmp_path / f"val-{len(match)}", **odd))
    tar = write_val(tmp_path / "cut") / "val-1.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    refused("--val: .*val-1.tar: the tar is cut", request(data, tmp_path / "out"), tmp_path / "cut")
    bad = write_val(tmp_path / "bad", boxless=label, cls=str(label), json='{"boxes": [[1, 2, 3]]}')
    refused(r"of class .*'odd': \[1, 2, 3\] is not a box", request(data, tmp_path / "out"), bad)
    refused("no such file", request(data, tmp_path / "out"), tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        (range(4, 13), r"class 12 is out of range: the model has classes 0\.\.11"),
        (range(2, 11), "no sample in the shards is of class 10"),
        (range(5), "5 classes cannot be split"),
        ([1, 1, 2, 3, 4, 5, 6], "each given once"),
    ],
)
def test_classes_are_checked(classes, match, data, tmp_path):
    refused(match, request(data, tmp_path / "out", classes=list(classes)), data / "val")
    assert not (tmp_path / "out").exists()


def until_training(number: int, data: Path, out: Path, **changed: object) -> None:
    """Run an experiment, and interrupt it before its n-th training."""
    real, begun = experiment.train, []

    def train(*args):
        begun.append(args)
        if len(begun) == number:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "train", train)
        with pytest.raises(KeyboardInterrupt):
            run(data, out, **changed)


def test_a_split_without_a_training_binds_no_folder(data, tmp_path):
    """A refused request writes nothing, and a split that an interrupted command left is replaced."""
    refused("--epochs 0: it must be 1 or more", request(data, tmp_path / "out", epochs=0), data / "val")
    assert not (tmp_path / "out").exists()
    until_training(1, data, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["split.json"]
    until_training(1, data, tmp_path / "out", epochs=1, steps_per_epoch=1, classes=[7, 2, 4, 3, 1, 9])
    split = json.loads((tmp_path / "out/split.json").read_text())["subsets"]
    assert split == make_split([1, 2, 3, 4, 7, 9], 5)


def test_a_training_refused_for_lack_of_memory_does_not_bind_the_folder(data, tmp_path, monkeypatch):
    def lacking(*args):
        raise UserError("too little memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saltern.pipeline.casm.training.trainee._check_memory", lacking)
        with pytest.raises(UserError, match="too little memory"):
            run(data, tmp_path / "out")
    assert (tmp_path / "out/train-F").is_dir()
    until_training(2, data, tmp_path / "out", epochs=1, steps_per_epoch=1)
    assert (tmp_path / "out/train-F/checkpoints/1").is_dir()


def test_a_shard_that_cannot_be_extracted_ends_the_experiment(data, tmp_path, monkeypatch):
    def broken(*args):
        raise ShardError("broken since")

    monkeypatch.setattr(Processor, "process", broken)
    with pytest.raises(UserError, match=r"run-F is incomplete.*repeat the command to resume"):
        run(data, tmp_path, epochs=1, steps_per_epoch=1)
    assert not (tmp_path / "train-EF").exists()


# --- the command


def test_the_command(data, tmp_path, monkeypatch):
    line = f"unseen-classes {data}/train --val {data}/val/val-0.tar --val {data}/val/val-1.tar --out {tmp_path}/out "
    line += "--model unseen_toys:wide --device cpu --side 64 --epochs 1 --batch-size 4 --steps-per-epoch 1 --seed 5"
    call = line.split()
    monkeypatch.setattr(experiment, "TRAININGS", dict(islice(TRAININGS.items(), 1)))
    ended = CliRunner().invoke(app, call)
    assert ended.exit_code == 0, ended.output
    kept = (tmp_path / "out/unseen.md").read_text()
    assert ended.stdout == kept.replace("\n\n", "\n")
    ended = CliRunner().invoke(app, [*call, "--json"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == (tmp_path / "out/unseen.json").read_text()
    for wrong, match in (
        (["--thinning", "L99"], "'L99' is not one of 'F', 'L'"),
        (["--lambda", "much"], "--lambda 'much' is not a number or auto"),
        (["--classes", "1,x"], "is not a list of numbers"),
        (["--seed", "4"], "seed: 5 there, 4 requested"),
    ):
        ended = CliRunner().invoke(app, [*call, *wrong])
        assert match in f"{ended.exception} {ended.output}"
