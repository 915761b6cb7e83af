"""`saltern sanity` on a run: its own method, images and targets; results in the run's folder."""

import io
import json
from pathlib import Path

import pytest
import torch
from commands import call, refused
from extracting import extract
from making import HELPERS, write_shards
from PIL import Image

from saltern.pipeline.metrics.sanity.cascade import cascade
from saltern.pipeline.metrics.sanity.run import _build, _images, _normalised, sanity
from saltern.pipeline.metrics.sanity.verdict import RULE
from saltern.pipeline.runs.reader import open_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 2, 4)
    assert extract(tmp_path / "in", tmp_path / "run", method="gradient", layer=None, map_dtype="float32") == 0
    return tmp_path / "run"


def test_the_first_images_are_judged_and_the_results_kept(run: Path) -> None:
    ended = call("sanity", run, "--images", "6", "--stages", "2", "--batch-size", "4", "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == RULE
    kept = json.loads((run / "metrics/sanity.json").read_bytes())
    assert (kept["images"], len(kept["stages"]), kept["method"]) == (6, 2, "gradient")
    assert ended.stdout.startswith(f"{kept['verdict']}: area under the rank correlation")
    picture = Image.open(io.BytesIO((run / "metrics/sanity.png").read_bytes()))
    assert (picture.format, picture.size) == ("PNG", (900, 500))
    printed = json.loads(call("sanity", run, "--images", "6", "--stages", "2", "--json", "--device", "cpu").stdout)
    for stage, expected in zip(printed["stages"], kept["stages"], strict=True):
        assert stage["absolute"]["value"] == pytest.approx(expected["absolute"]["value"], abs=1e-4)


def test_the_maps_before_are_those_of_the_run(run: Path) -> None:
    opened = open_run(str(run))
    rows, pixels = zip(*_images(opened), strict=True)
    assert [row.key for row in rows] == [row.key for row in opened]
    model, build_method = _build(opened.config, torch.device("cpu"))
    x_BCHW = _normalised(torch.stack(pixels), opened.config, torch.device("cpu"))
    target_B = torch.tensor([row.target for row in rows])
    for row, map_hw in zip(rows, build_method(model)(x_BCHW, target_B), strict=True):
        assert map_hw.numpy() == pytest.approx(row.map(), abs=1e-4)
    assert len(cascade(model, build_method, x_BCHW, target_B, stages=1).stages) == 1


def test_errors_name_the_fix(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "part-000000.tar").unlink()
    assert "--shards" in refused(call("sanity", run))
    assert "saltern extract" in refused(call("sanity", tmp_path / "in"))


def test_a_replaced_run_loses_its_results(run: Path, tmp_path: Path) -> None:
    sanity(str(run), 2, stages=1, device="cpu")
    assert extract(tmp_path / "in", run, {"overwrite": True}, method="grad-cam") == 0
    assert not (run / "metrics").exists()
