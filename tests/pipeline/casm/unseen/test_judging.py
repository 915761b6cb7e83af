"""The figures of the unseen-class experiment are those of a loop over all rows, and each file is read once for them."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from counted import use_counted
from made_run import make_run
from naive_metrics import inclusive

from saltern.pipeline.casm.unseen.experiment import SEEN, UNSEEN, _judge
from saltern.pipeline.casm.unseen.split import make_split
from saltern.pipeline.metrics.mean import Mean
from saltern.schemas.evaluation import CENTRE, FOUND, RANDOM, WHOLE


def test_le_is_that_of_a_loop_over_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)), broken=((1, 2),), method="casm")
    split = make_split(range(6), 5)  # of the classes 0 to 4, those that samples have, and one more
    store = use_counted(monkeypatch)
    found = _judge(made.path, [str(made.path.parent / "shards")], split, "F")
    assert list(found) == [FOUND, RANDOM, CENTRE, WHOLE]
    rows = [row for at in range(3) for row in pq.read_table(made.data(at)).to_pylist()]
    labels = {(row["shard"], row["index"]): row["label"] for row in rows}
    expected = {subject: {name: Mean() for name in means} for subject, means in found.items()}
    for folder in ("localization", "localization-controls"):
        for path in sorted((made.path / "metrics" / folder / "data").rglob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                subset = next((name for name in split if labels[row["shard"], row["index"]] in split[name]), None)
                if row["subject"] in expected and subset is not None:
                    expected[row["subject"]][subset].add(row["le"])
                    if row["subject"] == FOUND:
                        expected[FOUND][SEEN if subset == "F" else UNSEEN].add(row["le"])
    assert found == expected  # the sums are equal to the last bit
    assert sum(mean.count for name, mean in found[FOUND].items() if name in split) == 15
    assert json.loads((made.path / "metrics/localization.json").read_text())["samples"] == 15
    results = {path: count for path, count in store.opened.items() if "/metrics/" in path and "/data/" in path}
    assert set(results.values()) == {2}  # once by `evaluate`
    # Each time by a worker: of the run and of the controls; and once here.
    assert {count for path, count in store.opened.items() if "/run/data/" in path} == {3}
