"""Class visualization: the objective rises, a class is independent of its batch, and a run resumes."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from making import HELPERS, files, tiny
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.models.classifiers import load
from saltern.pipeline.models.passes import frozen
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.synthesis.ascend import ascend, start
from saltern.pipeline.synthesis.visualize import VisualizeRequest, parse_classes, visualizing
from saltern.schemas.config import Ascent
from saltern.schemas.errors import UserError
from saltern.schemas.visualization import visualization_schema

ASCENT = Ascent(steps=10, step_size=1.0, weight=1e-3, init="zero")
HOW = Ascent(steps=30, step_size=0.1, weight=1e-3, init="zero")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def visualize(out: Path, classes: str = "0-4", **wishes: Any) -> int:
    ascent = {key: wishes.pop(key) for key in ("steps", "step_size", "weight", "init") if key in wishes}
    given: dict[str, Any] = {"crop": 32, "batch_size": 2, "torch_threads": 1, **wishes}
    request = VisualizeRequest(classes, "making:tiny", ascent=replace(ASCENT, **ascent), **given)
    return conduct(visualizing(request), RunOptions(str(out), device="cpu", engine="local")).code


def rows(out: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted(out.glob("data/**/*.parquet"))]
    found: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return found


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """Return a network with random BatchNorm; without it, a zero image would give zeros and no gradient."""
    model = load("resnet18", "none", seed=0).model
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.2, generator=draw)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "step_size", "init"),
    [("tiny", 32, 300.0, "zero"), ("tiny", 32, 300.0, "noise"), ("resnet18", 64, 1.0, "zero")],
)
def test_the_objective_rises(name: str, side: int, step_size: float, init: str, resnet: nn.Module) -> None:
    torch.manual_seed(0)
    model = tiny() if name == "tiny" else resnet
    target_B = torch.tensor([1, 4, 2])
    how = Ascent(steps=15, step_size=step_size, weight=1e-4, init="zero")
    with frozen(model):
        peak = ascend(model, start(target_B, (3, side, side), init, 0), target_B, how)
    assert peak.objective_BT.shape == (3, 16)
    assert (peak.objective_BT.diff(dim=1) > 0).float().mean() > 0.9
    assert (peak.objective_BT[:, -1] > peak.objective_BT[:, 0] + 0.03).all()
    assert (peak.objective_BT[:, -1] > peak.objective_BT[:, 0] + 0.1).any()
    norm_B = peak.image_BCHW.square().flatten(1).sum(1)
    logits_BK = model(peak.image_BCHW).detach()
    torch.testing.assert_close(peak.logit_B, logits_BK.gather(1, target_B[:, None])[:, 0])
    torch.testing.assert_close(peak.objective_BT[:, -1], peak.logit_B - 1e-4 * norm_B)
    torch.testing.assert_close(peak.probability_B, logits_BK.softmax(1).gather(1, target_B[:, None])[:, 0])


def test_it_ends_where_a_linear_models_best_image_is() -> None:
    """For z = w . I, the objective is largest at I = w / (2 lambda)."""
    weight_KN = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    target_B = torch.tensor([2, 0])
    how = Ascent(steps=200, step_size=1.0, weight=0.1, init="zero")
    peak = ascend(lambda x_BCHW: x_BCHW.flatten(1) @ weight_KN.T, start(target_B, (3, 4, 4), "zero", 0), target_B, how)
    torch.testing.assert_close(peak.image_BCHW.flatten(1), weight_KN[target_B] / 0.2)


@pytest.mark.parametrize("init", ["zero", "noise"])
def test_a_batch_is_what_its_classes_are_alone(init: str) -> None:
    torch.manual_seed(0)
    model = tiny().double()
    target_B = torch.tensor([3, 0, 4])
    with frozen(model):
        together = ascend(model, start(target_B, (3, 32, 32), init, 7).double(), target_B, HOW)
        for i in range(3):
            one_B = target_B[i : i + 1]
            alone = ascend(model, start(one_B, (3, 32, 32), init, 7).double(), one_B, HOW)
            torch.testing.assert_close(together.image_BCHW[i : i + 1], alone.image_BCHW, rtol=1e-6, atol=1e-9)


def test_noise_follows_seed_and_class() -> None:
    shape, pair = (3, 4, 4), torch.tensor([5, 6])
    a = start(pair, shape, "noise", 0)
    assert not torch.equal(a[0], a[1])
    assert torch.equal(a[1:], start(torch.tensor([6]), shape, "noise", 0))
    assert not torch.equal(a, start(pair, shape, "noise", 1))


def test_rows_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize(tmp_path / "run", init="noise") == 0
    assert "5 classes; the objective rose in 5" in capsys.readouterr().out
    found = rows(tmp_path / "run")
    assert list(found[0]) == visualization_schema().names
    assert [row["target"] for row in found] == [0, 1, 2, 3, 4]
    assert [row["shard"] for row in found] == [f"classes-{n:06}" for n in (0, 0, 1, 1, 2)]
    for row in found:
        assert row["status"] == "ok"
        assert len(row["objective"]) == 11
        assert (row["objective_start"], row["objective_end"]) == (row["objective"][0], row["objective"][-1])
        picture = tmp_path / f"run/pictures/{row['target']:04}-class.png"
        assert picture.read_bytes() == row["image"]
        with Image.open(io.BytesIO(row["image"])) as image:
            assert image.size == (32, 32)
            assert np.asarray(image).std() > 1
    assert (tmp_path / "run/pictures.png").exists()
    assert not verify(*load_run_folder(str(tmp_path / "run"))).findings


def test_a_resume_does_the_rest_alone_and_writes_the_same(tmp_path: Path) -> None:
    assert visualize(tmp_path / "whole") == 0
    assert visualize(tmp_path / "cut") == 0
    kept = (tmp_path / "cut/receipts/classes-000000.json").read_bytes()
    (tmp_path / "cut/receipts/classes-000001.json").unlink()  # as a kill before its last write leaves it
    assert any("not done" in finding.reason for finding in verify(*load_run_folder(str(tmp_path / "cut"))).findings)
    assert visualize(tmp_path / "cut", batch_size=None, torch_threads=None) == 0  # batch size and threads are the run's
    assert (tmp_path / "cut/receipts/classes-000000.json").read_bytes() == kept
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with pytest.raises(UserError, match="steps: 10 there, 11 requested"):
        visualize(tmp_path / "cut", steps=11)
    with pytest.raises(UserError, match="shards: "):
        visualize(tmp_path / "cut", classes="0-3")


def test_an_ascent_that_runs_away_is_flagged(tmp_path: Path) -> None:
    assert visualize(tmp_path / "run", classes="1", steps=60, step_size=1e3, weight=10.0) == 1
    (row,) = rows(tmp_path / "run")
    assert (row["status"], row["image"]) == ("nonfinite", None)
    assert "smaller --step-size" in row["error"]


def test_classes_are_numbers_ranges_files_or_all(tmp_path: Path) -> None:
    (tmp_path / "wanted.txt").write_text("7\n3-4, 3\n")
    assert parse_classes("9,2-4,3", 10) == [2, 3, 4, 9]
    assert parse_classes(f"@{tmp_path}/wanted.txt", 10) == [3, 4, 7]
    assert parse_classes("all", 3) == [0, 1, 2]
    for text, words in (
        ("3,10", "10 is out of range"),
        ("cat", "is no class"),
        ("", "is no class"),
        ("4-2", "no class"),
    ):
        with pytest.raises(UserError, match=words):
            parse_classes(text, 10)
    with pytest.raises(UserError, match="No such file"):
        parse_classes("@missing", 10)


def test_the_command(tmp_path: Path) -> None:
    words = ["visualize-class", "--model", "making:tiny", "--classes", "1,3", "--out", str(tmp_path / "run")]
    ended = CliRunner().invoke(app, [*words, "--steps", "5", "--crop", "32", "--lambda", "0.01", "--device", "cpu"])
    assert ended.exit_code == 0, ended.output
    assert [row["target"] for row in rows(tmp_path / "run")] == [1, 3]
    status = CliRunner().invoke(app, ["status", str(tmp_path / "run")])
    assert "visualize-class of making:tiny" in status.stdout
    ended = CliRunner().invoke(app, [*words, "--steps", "5", "--crop", "32"])
    assert isinstance(ended.exception, UserError)
    assert "weight: 0.01 there, 0.001 requested" in str(ended.exception)


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    for wishes, words in (({"init": "cat"}, "none of zero, noise"), ({"step_size": 0.0}, "--step-size larger than 0")):
        with pytest.raises(UserError, match=words):
            visualize(tmp_path / "run", **wishes)
    assert not (tmp_path / "run").exists()
