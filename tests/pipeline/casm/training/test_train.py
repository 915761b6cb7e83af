"""A whole training: its log, its checkpoints, its commands."""

import sys

import pyarrow.parquet as pq
import pytest
import torch
from casm_toys import Small, files, log_lines, quiet, request, small
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.casm.training.train import train
from saltern.pipeline.masknet import checkpoint
from saltern.schemas.errors import UserError


@pytest.mark.slow
def test_the_training_trains(undisturbed):
    log = log_lines(undisturbed)
    assert [line["step"] for line in log] == list(range(18))
    assert {line["member"] for line in log} >= {-1, 0, 1, 2}  # the current one, and all of the pool
    assert max(line["right"] for line in log) > 0
    assert min(line["mask_loss"] for line in log) < 0
    names = {name.partition("/")[0] for name in files(undisturbed)}
    assert names == {"checkpoints", "pool", "log.jsonl", "lock-driver", "lock-writer", "curves.png"}
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["16", "18"]
    start, end = small().state_dict(), checkpoint.open_checkpoint(undisturbed).part("classifier")
    assert not torch.equal(start["fc.weight"], end["fc.weight"])


def test_a_checkpoint_costs_one_classifier(undisturbed):
    """A checkpoint holds the classifier and its momentum, of the same size. The pool has 3 more classifiers."""
    weights = sum(value.numel() * value.element_size() for value in Small().state_dict().values())
    found = checkpoint.open_checkpoint(undisturbed)
    taken = sum(t.numel() * t.element_size() for part in ("classifier", "sgd") for t in tensors_in(found.part(part)))
    assert weights < taken <= 2 * weights
    named = [
        checkpoint.open_checkpoint(folder).part("pool_manifest") for folder in sorted(found.folder.parent.iterdir())
    ]
    assert [len(manifest) for manifest in named] == [3, 3]
    steps = {f"{entry['step']}.safetensors" for manifest in named for entry in manifest}
    assert steps == {path.name for path in (undisturbed / "pool").iterdir()}  # no unnamed files are left


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_command_trains_and_extract_takes_its_folder(shards, tmp_path):
    (tmp_path / "classes.txt").write_text("4\n1, 0\n")
    line = f"train-casm {shards} --out {tmp_path}/casm --model casm_toys:small --side 64 --epochs 1 --batch-size 4"
    call = [*line.split(), "--classes", f"{tmp_path}/classes.txt", "--device", "cpu", "--steps-per-epoch", "3"]
    ended = CliRunner().invoke(app, call)
    assert ended.exit_code == 0, ended.output
    assert f"{tmp_path}/casm/checkpoints/3 is done" in ended.stdout
    config = checkpoint.open_checkpoint(tmp_path / "casm").config
    assert config["classes"] == [4, 1, 0]
    assert (config["settings"]["thinning"], config["settings"]["lam"]) == ("L100", "auto")
    for wrong, match in (
        (["--resume", "--thinning", "L99"], "'L99' is not one of 'F', 'L'"),
        (["--resume", "--lambda", "much"], "--lambda 'much' is not a number or auto"),
        (["--resume", "--classes", "1,x"], "is not a list of numbers"),
        (["--resume", "--seed", "4"], "seed: 0 there, 4 requested"),
    ):
        ended = CliRunner().invoke(app, [*call, *wrong])
        assert match in f"{ended.exception} {ended.output}"
    line = f"extract {shards} --out {tmp_path}/run --model casm_toys:small --resize 64 --crop 64 --method casm"
    ended = CliRunner().invoke(app, [*line.split(), "--checkpoint", f"{tmp_path}/casm", "--device", "cpu"])
    assert ended.exit_code == 0, ended.output
    assert set(pq.read_table(tmp_path / "run/data/0.parquet").to_pydict()["predicted"]) <= {0, 1, 4}


def test_without_tensorboard_the_option_names_its_extra(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard needs .*\[tensorboard\]"):
        train(request(shards, tmp_path / "run", tensorboard=True), quiet)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_config_file_says_the_same(shards, tmp_path):
    (tmp_path / "c.toml").write_text(
        'model = "casm_toys:small"\nside = 64\nepochs = 1\nsteps-per-epoch = 2\nbatch-size = 4\ntv = 0.5\n'
        'classes = [4, 1]\nmin-crop = 0.5\nlambda = "3"\ndevice = "cpu"\n'
    )
    call = ["train-casm", str(shards), "--out", f"{tmp_path}/casm", "--config", f"{tmp_path}/c.toml"]
    ended = CliRunner().invoke(app, call)
    assert ended.exit_code == 0, ended.output
    config = checkpoint.open_checkpoint(tmp_path / "casm").config
    assert (config["settings"]["tv"], config["settings"]["lam"], config["min_crop"]) == (0.5, 3.0, 0.5)
    assert (config["classes"], config["batch_size"], config["steps"]) == ([4, 1], 4, 2)
    (tmp_path / "c.toml").write_text("options = {a = 1}")
    assert "unknown key 'options'" in str(CliRunner().invoke(app, call).exception)
