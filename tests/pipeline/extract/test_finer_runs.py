"""Runs with a finer target: the row's class is that of the base target, and the map compares it with similar ones."""

from pathlib import Path

import numpy as np
import pytest
from extracting import extract
from making import HELPERS, picture, write_tar

from saltern.pipeline.runs.reader import open_run
from saltern.schemas.config import config_from_dict


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def test_rows_hold_the_class_of_the_base_target_and_maps_the_difference(tmp_path: Path) -> None:
    samples = [(f"k{i}", {"jpg": picture(i), "cls": str(i % 5)}) for i in range(5)]
    write_tar(tmp_path / "a.tar", [*samples, ("no", {"jpg": picture(9)})])
    runs = {}
    for target in ("label", "finer:2", "finer:2:0", "finer:4:1@top1", "top1", "finer:1@top:2"):
        out = tmp_path / target.replace(":", "-")
        assert extract(tmp_path / "a.tar", out, target=target) == 0
        runs[target] = open_run(str(out))
    rows = {target: list(run) for target, run in runs.items()}
    labelled, finer = rows["label"], rows["finer:2"]
    assert [row.status for row in finer] == [row.status for row in labelled]
    assert finer[5].status == "missing_label"
    assert [row.target for row in finer[:5]] == [row.label for row in finer[:5]]
    assert [row.score for row in finer[:5]] == [row.score for row in labelled[:5]]
    assert any(not np.allclose(one.map(), other.map()) for one, other in zip(finer[:5], labelled[:5], strict=True))
    for one, other in zip(rows["finer:2:0"][:5], labelled[:5], strict=True):
        np.testing.assert_allclose(one.map(), other.map(), rtol=1e-5, atol=1e-6)
    assert [row.target for row in rows["finer:4:1@top1"]] == [row.target for row in rows["top1"]]
    assert len(rows["finer:1@top:2"]) == 12
    assert [row.target for row in rows["finer:1@top:2"]][::2] == [row.target for row in rows["top1"]]
    assert len({run.run.fingerprint for run in runs.values()}) == len(runs)
    for target, run in runs.items():
        assert config_from_dict(run.config.to_dict()).target.text == target
