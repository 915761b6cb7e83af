"""The commands as a user calls them: words, exit codes, config files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from making import HELPERS, PYTHONPATH, TINY, picture, write_shards


def saltern(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "200"}
    line = [sys.executable, "-m", "saltern", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=HELPERS, check=False)


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of a user's error."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("saltern: ")]
    return line


def test_help_says_the_exit_codes() -> None:
    ended = saltern("--help")
    assert ended.returncode == 0
    for command in (
        "pack",
        "plan",
        "extract",
        "attack",
        "visualize-class",
        "train-casm",
        "evaluate",
        "status",
        "verify",
        "show",
        "methods",
        "models",
        "demo",
        "submit",
        "bench",
    ):
        assert f" {command} " in ended.stdout
    assert "0 all is done" in ended.stdout
    assert "2 a wrong call" in ended.stdout


def test_a_whole_way(tmp_path: Path) -> None:
    """pack, plan, extract, status, verify, show; then the same extract again, which has nothing to do."""
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images" / label / f"{i}.jpg").write_bytes(picture(i))
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert saltern("pack", tmp_path / "images", "--out", shards, "--per-shard", "2").returncode == 0
    planned = json.loads(saltern("plan", shards, "--model", "making:tiny", "--layer", "body", "--json").stdout)
    assert (planned["shards"], planned["samples"], planned["samples_exact"]) == (3, 6, True)
    assert planned["hours"] > 0
    assert planned["output_bytes"] > 0
    line = ["extract", shards, "--out", run, *TINY, "--method", "grad-cam", "--engine", "local"]
    ended = saltern(*line)
    assert ended.returncode == 0, ended.stderr
    assert "6 images" in ended.stdout
    assert "compute" in ended.stdout
    status = json.loads(saltern("status", run, "--json").stdout)
    assert (status["shards"], status["done"], status["samples"], status["failures"]) == (3, 3, 6, {})
    verdict = json.loads(saltern("verify", run, "--json").stdout)
    assert (verdict["findings"], verdict["rows"], verdict["recounted"]) == ([], 6, 3)
    page = tmp_path / "page.html"
    assert saltern("show", run, "--out", page).returncode == 0
    assert page.read_text().count("data:image/") >= 6
    again = saltern(*line)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_a_config_file_has_the_same_keys(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 3)
    config = tmp_path / "run.toml"
    config.write_text(
        f'shards = ["{tmp_path}/in"]\nmodel = "making:tiny"\nmethod = "gradient"\nresize = 40\ncrop = 32\n'
        'mean = [0.5, 0.5, 0.5]\nno-map = true\ndevice = "cpu"\n[options]\nreduce = "sum"\n'
    )
    ended = saltern("extract", "--config", config, "--out", tmp_path / "run", "--std", "0.2,0.2,0.2")
    assert ended.returncode == 0, ended.stderr
    made = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert (made["method"], made["crop"], made["mean"], made["save_map"]) == ("gradient", 32, [0.5] * 3, False)
    assert made["std"] == [0.2] * 3
    assert made["options"]["reduce"] == "sum"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model", "resnet51"), "did you mean 'resnet50'"),
        (("--method", "grad-cm"), "grad-cam"),
        (("--layer", "nowhere"), "nowhere"),
        (("-O", "steps=3"), "steps"),
        (("-O", "steps"), "is not key=value"),
        (("--target", "class:9"), "0..4"),
        (("--target", "best"), "label, top1, top:N, class:ID"),
        (("--discretize", "mean:x"), "otsu"),
        (("--map-dtype", "int4"), "uint8, float16, float32"),
        (("--crop", "64"), "smaller than --crop 64"),
        (("--mean", "1,2"), "three numbers"),
        (("--device", "cuda"), "no CUDA device"),
        (("--engine", "local", "--workers", "2"), "--engine ray"),
        (("--weights", "gone.pth"), "gone.pth"),
    ],
)
def test_a_wrong_call_is_one_line_and_starts_nothing(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the call is right")
    write_shards(tmp_path / "in", 1, 3)
    ended = saltern("extract", tmp_path / "in", "--out", tmp_path / "run", *TINY, "--method", "grad-cam", *words)
    assert line in refused(ended)
    assert not (tmp_path / "run").exists()


def test_wrong_shards_configs_and_runs_are_one_line(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 2)
    rest = ("--out", tmp_path / "run", *TINY, "--method", "grad-cam")
    assert "nothing-*.tar" in refused(saltern("extract", tmp_path / "in/nothing-*.tar", *rest))
    config = tmp_path / "c.toml"
    config.write_text("batchsize = 3")
    assert "did you mean 'batch-size'" in refused(saltern("extract", tmp_path / "in", *rest, "--config", config))
    config.write_text("batch-size = ")
    assert "c.toml" in refused(saltern("extract", tmp_path / "in", *rest, "--config", config))
    assert "holds no run" in refused(saltern("status", tmp_path / "in"))
    assert "holds no run" in refused(saltern("verify", tmp_path / "in"))
    ended = saltern("extract", tmp_path / "in/part-000000.tar", *rest)
    assert ended.returncode == 0
    assert "1 of 3 sibling shards" in ended.stderr


def test_missing_options_are_said_by_name() -> None:
    ended = saltern("extract")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_lists_name_what_there_is() -> None:
    methods = saltern("methods").stdout
    assert all(name in methods for name in ("grad-cam", "cam", "gradient"))
    models = saltern("models").stdout.splitlines()
    assert "resnet50" in models
    assert "efficientnet_lite0" in models


def test_an_error_in_the_code_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "slip.py").write_text("def model():\n    raise ZeroDivisionError('a slip')\n")
    write_shards(tmp_path / "in", 1, 1)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    line = [
        "extract",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "run"),
        "--model",
        "slip:model",
        "--method",
        "gradient",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "saltern", *line], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert ended.returncode == 3
    assert "ZeroDivisionError: a slip" in ended.stderr
