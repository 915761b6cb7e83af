"""`saltern layers` makes the runs that `extract` makes, and the numbers that `evaluate` gives."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from extracting import extract
from making import TINY, files, picture, write_tar
from naive_metrics import inclusive
from PIL import Image
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.metrics.evaluate import EvaluateRequest, evaluate
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow

METRICS = ("average-drop", "increase", "box-iou")
LAYERS = ("body.2", "body.4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "shards"
    for shard in range(2):
        samples = [
            (f"k{at}", {"jpg": picture(at, 44, 60), "cls": str(at % 5), "json": inclusive((5, 4, 40, 30 + at))})
            for at in range(3 * shard, 3 * shard + 3)
        ]
        write_tar(folder / f"{shard}.tar", samples)
    return folder


def call(shards: Path, out: Path, method: str, layers: str, *more: str) -> Any:
    model = [word for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] != "--layer" for word in pair]
    words = ["layers", str(shards), "--out", str(out), "--method", method, "--layers", layers, *model, *more]
    return CliRunner().invoke(app, [*words, "--engine", "local", "--batch-size", "4"])


@pytest.fixture(scope="module")
def compared(shards: Path) -> tuple[Path, str]:
    """The folder of a comparison, and what the command printed."""
    out = shards.parent / "out"
    ended = call(shards, out, "grad-cam,layer-cam", ",".join(LAYERS), "--metric", ",".join(METRICS))
    assert ended.exit_code == 0, ended.output
    return out, ended.stdout


@pytest.mark.slow
def test_the_runs_are_those_of_extract(shards: Path, compared: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = compared
    assert extract(shards, tmp_path / "alone", method="layer-cam", layer="body.2", torch_threads=None) == 0
    made = files(out / "body.2/layer-cam")
    assert made == files(tmp_path / "alone")
    assert made != files(out / "body.4/layer-cam")


def test_the_numbers_are_those_of_evaluate(compared: tuple[Path, str]) -> None:
    out, printed = compared
    found = json.loads((out / "layers.json").read_text())
    assert [(run["method"], run["layer"]) for run in found["runs"]] == [
        (method, layer) for method in ("grad-cam", "layer-cam") for layer in LAYERS
    ]
    smooth = {"total_variation": "neither", "entropy": "neither"}  # which every table of faithfulness has
    assert found["better"] == {"box_iou": "more", **smooth, "average_drop": "less", "increase": "more"}
    folders = [f"{out}/{run['layer']}/{run['method']}" for run in found["runs"]]
    request, options = EvaluateRequest(folders, metrics=METRICS), RunOptions("unused", engine="local", device="cpu")
    for run, folder, alone in zip(found["runs"], folders, evaluate(request, options).runs, strict=True):
        assert run["run"] == folder
        assert run["metrics"] == {name: estimate.to_dict() for name, estimate in alone.estimates.items()}
    assert list(found["controls"]) == ["random", "centre-blob", "edges", "centre-box", "whole-image"]
    lines = printed.splitlines()
    assert (out / "layers.md").read_text().startswith("\n".join(lines[:11]))
    assert lines[0].replace(" ", "") == "|method|layer|boxIoU%↑|TV|entropy,bits|averagedrop%↓|increase%↑|"
    value = 100 * found["runs"][3]["metrics"]["average_drop"]["value"]
    assert [cell.strip() for cell in lines[5].split("|")[1:3]] == ["layer-cam", "body.4"]
    assert f"| {value:.1f} ±" in lines[5]
    width, height = Image.open(io.BytesIO((out / "layers.png").read_bytes())).size
    assert width > height


@pytest.mark.slow
def test_a_repeated_command_computes_only_what_is_missing(shards: Path, compared: tuple[Path, str]) -> None:
    out, printed = compared
    inodes = {path: path.stat().st_ino for path in out.rglob("data/*.parquet")}
    assert len(inodes) == 2 * (4 + 3 * (4 + 1))  # shards; runs, and of three families the runs and the controls
    (out / "body.4/grad-cam/receipts/1.json").unlink()
    ended = call(shards, out, "grad-cam,layer-cam", ",".join(LAYERS), "--metric", ",".join(METRICS))
    assert ended.stdout == printed
    changed = {path for path, inode in inodes.items() if path.stat().st_ino != inode}
    assert out / "body.4/grad-cam/data/1.parquet" in changed
    assert all("body.4" in str(path) for path in changed)


def test_one_method_has_its_folder_too(shards: Path, tmp_path: Path) -> None:
    ended = call(shards, tmp_path, "grad-cam", "body.4", "--metric", "box-iou")
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "body.4/grad-cam/run.json").exists()


@pytest.mark.slow
def test_a_failed_shard_is_named_and_counts_for_no_layer(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "in")
    tar = tmp_path / "in/1.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    ended = call(tmp_path / "in", tmp_path / "out", "grad-cam", ",".join(LAYERS), "--metric", "box-iou")
    assert ended.exit_code == 1
    assert "\n1: data: " in ended.stderr
    found = json.loads((tmp_path / "out/layers.json").read_text())
    assert {run["metrics"]["box_iou"]["count"] for run in found["runs"]} == {3}


def test_wrong_calls_start_nothing(shards: Path, tmp_path: Path) -> None:
    for method, layers, metric, reason in (
        ("grad-cam", "body.2,body.9", "le", "Tiny has no layer 'body.9'"),
        ("grad-cam", "body.2,body.2", "le", "a layer is given twice"),
        ("grad-cam,gradient", "body.2", "le", "--method gradient has no target layer"),
        ("grad-cam", "body.2", "iou", "--metric 'iou' is not one of"),
    ):
        ended = call(shards, tmp_path / "out", method, layers, "--metric", metric)
        assert isinstance(ended.exception, UserError)
        assert reason in str(ended.exception)
    assert not (tmp_path / "out").exists()
