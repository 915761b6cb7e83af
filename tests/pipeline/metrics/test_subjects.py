"""Results in an object store are read once and many at a time, with the numbers of a loop over the files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from counted import use_counted
from judging import forget, judge
from made_run import Made, make_run
from naive_metrics import inclusive

from saltern.pipeline.engine.derived import Derived
from saltern.pipeline.metrics.estimate import Means
from saltern.pipeline.metrics.evaluate import Evaluation, to_json
from saltern.pipeline.metrics.subjects import read_subjects
from saltern.pipeline.metrics.table import lines_of
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.evaluation import CONTROLS, FOUND

FAMILIES = ["localization", "statistics"]  # which need no network


def figures(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return all numbers of the table."""
    return [to_json(found) for _, found in lines_of(evaluation)]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, json=inclusive((10, 10, 40, 40)))


def test_each_data_file_is_opened_once_for_all_families(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = figures(judge(made.path, metrics=FAMILIES))
    forget(made)
    store = use_counted(monkeypatch)
    assert figures(judge(made.path, metrics=FAMILIES)) == expected
    for calls in range(2):
        opened = {path: count for path, count in store.opened.items() if "/metrics/" in path and "/data/" in path}
        assert len(opened) == len(FAMILIES) * 2 * 3  # the run and its controls, three shards
        assert set(opened.values()) == {1}
        receipts = [count for path, count in store.opened.items() if "/metrics/" in path and "/receipts/" in path]
        assert receipts == [1] * len(opened) * calls  # the engine knows those that it has just written
        store.opened.clear()
        assert figures(judge(made.path, metrics=FAMILIES)) == expected


def test_means_and_intervals_are_those_of_a_loop_over_the_files(made: Made) -> None:
    evaluation = judge(made.path)
    for folder, subjects in (("localization", [FOUND]), ("localization-controls", CONTROLS)):
        tables = [
            pq.read_table(made.path / f"metrics/{folder}/data/{shard.name}.parquet").to_pylist()
            for shard in made.run.shards
        ]
        for subject in subjects:
            means = Means(2)
            for rows in tables:
                means.add(np.array([[row["le"], row["f1"]] for row in rows if row["subject"] == subject], float))
            found = evaluation.runs[0].estimates if subject == FOUND else evaluation.controls[subject]
            assert found["le"].to_dict() == means.estimates()[0].to_dict()
            assert found["f1"].value == pytest.approx(means.estimates()[1].value)  # other columns share its product


def test_a_missing_file_and_a_store_that_fails_are_told_apart(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(made.path / "metrics/localization"))
    results = Derived(store, made.run.shards, {}, {})
    with pytest.raises(ShardError, match=r"data/part0/train.parquet cannot be read \(it is missing\)"):
        list(read_subjects(results, ["le"]))

    def unplugged(name: str) -> bytes:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(store, "read", unplugged)
    with pytest.raises(UserError, match=r"train.parquet cannot be read \(no route to host\); repeat the command"):
        list(read_subjects(results, ["le"]))
