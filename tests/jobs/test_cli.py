"""The commands as a user calls them: messages, exit codes, config files."""

import json
import sys
from pathlib import Path

import pytest
from commands import call, refused, start
from making import TINY, picture, write_shard, write_shards

COMMANDS = (
    *("pack", "plan", "extract", "attack", "visualize-class", "train-casm", "unseen-classes", "evaluate", "status"),
    *("train-localizer", "sanity"),
    *("verify", "show", "export", "methods", "models", "demo", "submit", "bench"),
)


@pytest.mark.slow
def test_help_names_commands_and_exit_codes() -> None:
    ended = start("--help")
    assert ended.returncode == 0
    assert "Usage: saltern " in ended.stdout
    for command in COMMANDS:
        assert f" {command} " in ended.stdout
    assert "0 everything is done" in ended.stdout
    assert "2 a wrong call" in ended.stdout


def test_version() -> None:
    from saltern import __version__

    ended = call("--version")
    assert (ended.returncode, ended.stdout) == (0, f"saltern {__version__}\n")


def test_without_a_command_help_is_printed() -> None:
    ended = call()
    assert ended.returncode == 2
    assert " extract " in ended.stdout + ended.stderr
    assert refused(call("extrct")).startswith("saltern: No such command 'extrct'. Did you mean 'extract'")


@pytest.mark.slow
def test_a_whole_way(tmp_path: Path) -> None:
    """Pack, plan, extract, status, verify, show; then extract again, which has nothing to do."""
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images" / label / f"{i}.jpg").write_bytes(picture(i))
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert call("pack", tmp_path / "images", "--out", shards, "--per-shard", "2").returncode == 0
    planned = json.loads(call("plan", shards, "--model", "making:tiny", "--layer", "body", "--json").stdout)
    assert (planned["shards"], planned["samples"], planned["samples_exact"]) == (3, 6, True)
    assert planned["hours"] > 0
    assert planned["output_bytes"] > 0
    line = ["extract", shards, "--out", run, *TINY, "--method", "grad-cam", "--engine", "local"]
    ended = call(*line)
    assert ended.returncode == 0, ended.stderr
    assert "6 images" in ended.stdout
    assert "compute" in ended.stdout
    status = json.loads(call("status", run, "--json").stdout)
    assert (status["shards"], status["done"], status["samples"], status["failures"]) == (3, 3, 6, {})
    assert "3 of 3 shards done, 6 samples; rows: 6 ok" in call("status", run).stdout
    verdict = json.loads(call("verify", run, "--json").stdout)
    assert (verdict["findings"], verdict["rows"], verdict["recounted"]) == ([], 6, 3)
    page = tmp_path / "page.html"
    assert call("show", run, "--out", page).returncode == 0
    assert page.read_text().count("data:image/") >= 6
    again = call(*line)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_a_config_file_has_the_same_keys(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 3)
    config = tmp_path / "run.toml"
    config.write_text(
        f'shards = ["{tmp_path}/in"]\nmodel = "making:tiny"\nmethod = "gradient"\nresize = 40\ncrop = 32\n'
        'mean = [0.5, 0.5, 0.5]\nno-map = true\ndevice = "cpu"\nshard-timeout = 60\n[options]\nreduce = "sum"\n'
    )
    ended = call("extract", "--config", config, "--out", tmp_path / "run", "--std", "0.2,0.2,0.2")
    assert ended.returncode == 0, ended.stderr
    made = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert (made["method"], made["crop"], made["mean"], made["save_map"]) == ("gradient", 32, [0.5] * 3, False)
    assert made["std"] == [0.2] * 3
    assert made["options"]["reduce"] == "sum"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(("--model", "resnet51"), "did you mean 'resnet50'", marks=pytest.mark.slow),  # imports torchvision
        (("--method", "grad-cm"), "grad-cam"),
        (("--layer", "nowhere"), "nowhere"),
        (("-O", "steps=3"), "steps"),
        (("-O", "steps"), "is not key=value"),
        (("--target", "class:9"), "0..4"),
        (("--target", "best"), "label, top1, top:N, class:ID"),
        (("--discretize", "mean:x"), "otsu"),
        (("--map-dtype", "int4"), "'uint8', 'float16', 'float32'"),
        (("--engine", "spark"), "'auto', 'local', 'ray'"),
        (("--crop", "64"), "smaller than --crop 64"),
        (("--mean", "1,2"), "three numbers"),
        (("--device", "cuda"), "no CUDA device"),
        (("--engine", "local", "--workers", "2"), "--engine ray"),
        (("--weights", "gone.pth"), "gone.pth"),
        (("--modle", "x"), "--modle"),
    ],
)
def test_a_wrong_call_is_one_line_and_starts_nothing(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the call is right")
    write_shards(tmp_path / "in", 1, 3)
    ended = call("extract", tmp_path / "in", "--out", tmp_path / "run", *TINY, "--method", "grad-cam", *words)
    assert line in refused(ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wrong_shards_configs_and_runs_are_one_line(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 2)
    rest = ("--out", tmp_path / "run", *TINY, "--method", "grad-cam")
    assert "nothing-*.tar" in refused(call("extract", tmp_path / "in/nothing-*.tar", *rest))
    config = tmp_path / "c.toml"
    for text, line in (
        ("batchsize = 3", "did you mean 'batch-size'"),
        ("batch-size = ", "c.toml"),
        ('engine = "spark"', "'auto', 'local', 'ray'"),
        ("options = 3", "options must be a table"),
    ):
        config.write_text(text)
        assert line in refused(call("extract", tmp_path / "in", *rest, "--config", config))
    assert "holds no run" in refused(call("status", tmp_path / "in"))
    assert "holds no run" in refused(call("verify", tmp_path / "in"))
    ended = call("extract", tmp_path / "in/part-000000.tar", *rest)
    assert ended.returncode == 0
    assert "1 of 3 sibling shards" in ended.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "extract in --out run --model resnet18 --method cam --overwrite --retry-failed",
            "--retry-failed has no effect",
        ),
        (
            "attack in --out run --model resnet18 --guide cam --weights none --recompute 2 --beta 0",
            "--recompute has no",
        ),
        ("train-casm in --out run --model resnet18 --gpus-per-worker 1", "--gpus-per-worker has no effect"),
        ("train-casm in --out run --model resnet18 --lambda 3 --mask-area 0.6", "--mask-area has no effect"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "in" / "a-0.tar", 2)
    assert line in refused(call(*words.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_missing_options_are_said_by_name() -> None:
    assert "'SHARDS...'" in refused(call("extract"))
    assert "'--model'" in refused(call("extract", "a.tar"))


def test_methods_are_listed_with_cost_options_and_choices() -> None:
    table = call("methods").stdout
    assert all(f"  {name} " in table for name in ("grad-cam", "cam", "gradient", "integrated-gradients"))
    assert "1 forward" in table
    assert "reduce=max" in table
    listed = {method["name"]: method for method in json.loads(call("methods", "--json").stdout)}
    apart = {name for name, method in listed.items() if not method["shares_forward"]}
    assert apart == {"casm", "localizer"}  # they explain no class
    reduce = listed["gradient"]["options"][0]
    assert (reduce["name"], reduce["default"], reduce["values"]) == ("reduce", "max", ["max", "sum", "l2"])
    assert all(method["summary"] and method["cost"] for method in listed.values())
    assert all(option["help"] for method in listed.values() for option in method["options"])


def test_models_are_listed_one_on_a_line() -> None:
    models = call("models").stdout.splitlines()
    assert "resnet50" in models
    assert "efficientnet_lite0" in models


def test_an_error_in_the_code_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folder of the model is added
    (tmp_path / "slip.py").write_text("def model():\n    raise ZeroDivisionError('a slip')\n")
    write_shards(tmp_path / "in", 1, 1)
    ended = call("extract", "in", "--out", "run", "--model", "slip:model", "--method", "gradient")
    assert ended.returncode == 3
    assert "Traceback" in ended.stderr
    assert "ZeroDivisionError: a slip" in ended.stderr
