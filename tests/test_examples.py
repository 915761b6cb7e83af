"""Every script in examples/ runs."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from making import HELPERS, write_shards
from PIL import Image

import saltern

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES: dict[str, Any] = {"resize": 72, "crop": 64, "device": "cpu", "batch_size": 4}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), 2, 4)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of the example model."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLES)
        patch.syspath_prepend(str(EXAMPLES))
        result = saltern.extract(
            shards, out, model="own_model:small_net", method="grad-cam", target="top1", engine="local", **SIZES
        )
    assert (result.code, result.done, result.shards, result.rows) == (0, 2, 2, {"ok": 8})
    return out


def test_all_examples_are_listed_and_short() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert len(scripts) == 6
    for name in scripts:
        assert 20 <= len((EXAMPLES / name).read_text().splitlines()) <= 60, name


def test_read_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("read_run").main(str(run), str(tmp_path / "map.png"))
    assert capsys.readouterr().out.count("predicted") == 8
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size == (80, 60)  # of the original
        assert picture.getextrema()[1] == 255


def test_train_on_maps(run: Path) -> None:
    losses = example("train_on_maps").main(str(run), 4)
    assert losses[-1] < losses[0]


def test_own_method(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    given = {"model": "own_model:small_net", "method": "own_method:ActivationNorm", "options": {"order": 1}}
    assert saltern.extract(shards, tmp_path / "run", engine="local", **given, **SIZES).rows == {"ok": 8}
    row = saltern.open_run(str(tmp_path / "run")).row("k00000")
    assert row.target is None
    assert row.map().min() >= 0


def test_duckdb_queries(run: Path) -> None:
    answers = example("duckdb_queries").main(str(run))
    assert answers["rows by status"] == [("ok", 8)]
    assert sum(images for _, images, _, _ in answers["classes with the largest masks"]) == 8


@pytest.mark.slow
def test_cluster_job(shards: Path, tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    given = {**SIZES, "model": "making:tiny", "layer": "body", "workers": 1}
    main = example("cluster_job").main
    assert main(str(shards), str(tmp_path / "run"), ray_address, **given) == 0
    assert {row.status for row in saltern.open_run(str(tmp_path / "run"))} == {"ok"}
