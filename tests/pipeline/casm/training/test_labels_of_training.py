"""`train-casm` compares the classes of its shards with the model's, as `extract` does."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from casm_toys import request as request_for
from making import picture, write_tar

from saltern.pipeline.casm.algorithm.log import MEASURED, Log
from saltern.pipeline.casm.training import plan
from saltern.pipeline.casm.training.plan import TrainingPlan, make_plan
from saltern.pipeline.casm.training.trainee import Labels
from saltern.pipeline.models import classifiers
from saltern.pipeline.training import journal
from saltern.schemas.errors import UserError

MODEL = ["cat", "dog", "fox", "owl", "elk", "bat"]


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the network of these tests names of its classes."""
    load = classifiers.load

    def loaded(*given: Any, **more: Any) -> classifiers.Classifier:
        return replace(load(*given, **more), class_names=MODEL)

    monkeypatch.setattr(plan.classifiers, "load", loaded)


def shards(folder: Path, names: list[str]) -> str:
    boxes = json.dumps({"boxes": [[0, 0, 9, 9]]})
    write_tar(folder / "s.tar", ((n, {"jpg": picture(i), "cls": str(i), "json": boxes}) for i, n in enumerate(names)))
    (folder / "classes.json").write_text(json.dumps(names))
    return str(folder)


def planned(tmp_path: Path, train: list[str], val: list[str], **wishes: Any) -> tuple[TrainingPlan, list[str]]:
    val_shards = [shards(tmp_path / "val", val)]
    request = request_for(Path(shards(tmp_path / "train", train)), tmp_path / "out", val=val_shards, **wishes)
    said: list[str] = []
    return make_plan(request, "cpu", None, said.append), said


def test_training_and_validation_get_the_model_s_numbers(tmp_path: Path) -> None:
    made, said = planned(tmp_path, ["dog", "cat"], ["cat", "elk"])
    assert made.index.label_N.tolist() == [1, 0]
    assert made.config["labels"] == {"0": 1, "1": 0}
    assert made.val_labels == {0: 0, 1: 4}
    assert sum("got the model's numbers" in line for line in said) == 2


def test_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"class 0 'my bed', 1 'cat' in the shards.*is 'cat'; give the model's class of each with --labels FILE",
    ):
        planned(tmp_path, ["my bed", "cat"], ["cat"])
    made, _ = planned(tmp_path, ["my bed", "cat"], ["cat"], labels="as-is")
    assert (made.index.label_N.tolist(), made.config["labels"], made.val_labels) == ([0, 1], None, None)


@pytest.mark.parametrize(("right", "start", "warned"), [(0.0, 0, 1), (0.5, 0, 0), (0.0, 16, 0)])
def test_labels_that_the_classifier_never_predicts_are_warned_of_once(
    tmp_path: Path, right: float, start: int, warned: int
) -> None:
    said: list[str] = []
    labels = Labels(1000, 64, start)
    trainee = SimpleNamespace(warn=lambda line: labels.warn(line["right"]), describe=lambda line: "")
    with journal.Journal(tmp_path, start, 300, 64, said.append, trainee) as watched:
        for step in range(start, start + 40):
            measured = torch.full((len(MEASURED),), 0.5, dtype=torch.float64)
            measured[MEASURED.index("right")] = right
            watched.add(Log(step, -1, measured, torch.tensor(2.0, dtype=torch.float64), 0.0, 0.0), torch.tensor(0.0))
        watched.flush()
    assert [line for line in said if line.startswith("WARNING: the labels are the model's top-1 in 0 of 512")] == [
        line for line in said if "WARNING" in line
    ]
    assert sum("WARNING" in line for line in said) == warned
