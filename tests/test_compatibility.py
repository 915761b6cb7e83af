"""Runs and trainings made by version 0.1.0 are verified, read and resumed.

`data/made_by_0.1.tar.gz` holds one run of each job on the network `making:tiny`, a CASM training on `casm_toys:small`,
and their shards. All of them were made below /tmp/old, which the fixture replaces.
"""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import HELPERS
from safetensors.numpy import load_file
from typer.testing import CliRunner

import saltern
from saltern.jobs.main import app

ARCHIVE = Path(__file__).parent / "data/made_by_0.1.tar.gz"
TINY = "--model making:tiny --layer body --resize 40 --crop 32 --device cpu --engine local --batch-size 2"
EXTRACT = f"extract {{old}}/shards --out {{old}}/extract {TINY} --method grad-cam --target top1"
ATTACK = f"attack {{old}}/shards --out {{old}}/attack {TINY} --guide grad-cam --steps 3 --no-save-images"
CLASSES = "visualize-class --model making:tiny --classes 0-2 --out {old}/classes --steps 3 --crop 32 --batch-size 2"
TRAIN = (
    "train-casm {old}/casm-shards --out {out} --model casm_toys:small --epochs 3 --steps-per-epoch 2 --batch-size 4 "
    "--side 64 --checkpoint-every 2 --device cpu --decode-threads 2 --thinning L --lambda auto --pool-size 3 "
    "--lr-classifier 0.01 --seed 5 --preset published"
)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unpack the archive, and replace the paths in its files by this folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for run in tmp_path.glob("*/run.json"):
        run.write_text(run.read_text().replace("/tmp/old", str(tmp_path)))
    monkeypatch.chdir(HELPERS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def call(line: str, **places: Path) -> str:
    """Return the output of the command, which must exit with code 0."""
    ended = CliRunner().invoke(app, line.format(**places).split())
    assert ended.exit_code == 0, ended.output
    return ended.output


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(run.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("job", ["extract", "attack", "classes"])
def test_a_run_is_verified(old: Path, job: str) -> None:
    verdict = json.loads(call(f"verify {{old}}/{job} --json", old=old))
    assert verdict["findings"] == []
    status = json.loads(call(f"status {{old}}/{job} --json", old=old))
    assert status["done"] == status["shards"] == 2
    assert status["fingerprint"] == json.loads((old / job / "run.json").read_text())["fingerprint"]


def test_a_run_is_read(old: Path) -> None:
    run = saltern.open_run(str(old / "extract"))
    for row in rows(old / "extract"):
        read = run.row(row["key"])
        assert read.map("input").shape == read.mask().shape == (32, 32)
        assert read.boxes == row["boxes"]
    assert len(list(saltern.SaliencyDataset(str(old / "extract")))) == 6


@pytest.mark.parametrize(("job", "line"), [("extract", EXTRACT), ("attack", ATTACK), ("classes", CLASSES)])
def test_a_run_is_resumed(old: Path, job: str, line: str) -> None:
    """The same command processes the shard without a receipt again, with the same result."""
    run = old / job
    assert "nothing to do" in call(line, old=old)
    before, config = rows(run), json.loads((run / "run.json").read_text())
    receipt = sorted(run.glob("receipts/*.json"))[1]
    fields = set(json.loads(receipt.read_text()))
    receipt.unlink()
    (run / "data" / f"{receipt.stem}.parquet").unlink()
    call(line, old=old)
    assert set(json.loads(receipt.read_text())) >= fields
    resumed = json.loads((run / "run.json").read_text())
    for key in ("config", "fingerprint", "class_names", "schema_version"):
        assert resumed[key] == config[key]
    for new, old_ in zip(resumed["shards"], config["shards"], strict=True):
        assert new.items() >= old_.items()
    after = rows(run)
    assert [set(row) for row in after] == [set(row) for row in before]
    for one, other in zip(before, after, strict=True):
        assert one["key"] == other["key"]
        assert one["status"] == other["status"] == "ok"
        assert one["target"] == other["target"]
        if job == "extract":
            maps = [np.frombuffer(row["map"], np.float32) for row in (one, other)]
            np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-6)  # another processor may change last bits
            assert np.abs(np.subtract(one["boxes"], other["boxes"])).max() <= 1


@pytest.mark.slow
def test_a_training_is_resumed(old: Path) -> None:
    """Two steps after the checkpoint give the weights of a training of all six steps."""
    call(TRAIN + " --resume", old=old, out=old / "casm")
    call(TRAIN, old=old, out=old / "whole")
    one, other = (load_file(old / name / "checkpoints/6/tensors.safetensors") for name in ("casm", "whole"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_an_old_checkpoint_makes_masks(old: Path) -> None:
    shutil.rmtree(old / "casm/checkpoints/6", ignore_errors=True)
    call(
        "extract {old}/casm-shards --out {old}/masks --model casm_toys:small --method casm --checkpoint {old}/casm "
        "--resize 64 --crop 64 --device cpu --engine local",
        old=old,
    )
    assert {row["status"] for row in rows(old / "masks")} == {"ok"}


@pytest.mark.slow
def test_a_run_is_measured_and_exported(old: Path) -> None:
    call("evaluate {old}/extract --metric statistics --engine local", old=old)
    found = json.loads((old / "extract/metrics/statistics.json").read_text())
    assert found["samples"] == len(rows(old / "extract"))
    assert "6 rows of 2 shards" in call("export {old}/extract --format npy --out {old}/npy --engine local", old=old)
    assert "area under" in call("sanity {old}/extract --images 4 --stages 2 --engine local --device cpu", old=old)
