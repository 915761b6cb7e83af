"""`--compile`: what runs without gradients is compiled at one shape, and gives nearly the maps of the eager method."""

from dataclasses import replace
from pathlib import Path

import casm_toys
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from extracting import REQUEST, extract
from making import HELPERS, tiny, write_shards

from saltern.pipeline.casm.training.train import train
from saltern.pipeline.extract.compilation import EARNS, choose_compile
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.extract.request import resolve
from saltern.pipeline.methods import Method, available, build
from saltern.pipeline.models import compiling
from saltern.pipeline.models.classifiers import load
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Rule, Target

TOLERANCE = 1e-5  # of a map's largest value, in float32


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the compiler by one that notes the batch of each call, and return the notes."""
    seen: list[int] = []

    def compile(function, **options):
        assert options["dynamic"] is False
        return lambda x: seen.append(len(x)) or function(x)

    monkeypatch.setattr(torch, "compile", compile)
    return seen


def test_every_batch_has_one_shape_and_rows_are_cut_off(shapes: list[int], tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2, 5)
    assert extract(tmp_path / "in", tmp_path / "run", compile="on", target="top:2") == 0
    assert extract(tmp_path / "in", tmp_path / "eager", target="top:2") == 0
    assert len(shapes) == 5  # at the start, and two batches of each shard
    assert set(shapes) == {4}
    for name in ("part-000000", "part-000001"):
        one, other = (pq.read_table(tmp_path / run / f"data/{name}.parquet") for run in ("run", "eager"))
        assert one.slice(0, 8).equals(other.slice(0, 8))  # the first batch, two rows an image
        # The last image's bits depend on how many are computed at once.
        assert all(one[column].equals(other[column]) for column in ("key", "target", "status"))


def test_full_memory_halves_the_shape_too(shapes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    method = build("grad-cam", tiny(), layer="body")
    explain = Explainer(
        method, torch.device("cpu"), Preprocess(32, 32), target=Target.parse("top1", 5), rule=Rule.parse("mean:1")
    )
    compiling.compile_parts(method.trunk(), deterministic=True)
    explain._full = 8
    images = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(method, "explain", lambda *args: torch.empty(2**50))
        with pytest.raises(RuntimeError, match="allocate"):
            explain(images, torch.zeros(5, dtype=torch.long))
    found, _ = explain(images[:3], torch.zeros(3, dtype=torch.long)).wait()
    assert len(found.columns["map"]) == 3
    assert shapes == [4]


def test_the_choice_is_in_the_fingerprint_and_a_resumed_run_keeps_it(shapes: list[int], tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 5)
    request = replace(REQUEST, shards=[str(tmp_path / "in")], torch_threads=1)
    eager, lines = resolve(request, None, "cpu", 1)
    compiled, said = resolve(replace(request, compile="on"), None, "cpu", 1)
    assert lines[0] == "compile off (auto compiles on a GPU only)"
    assert said[0] == "compile on (1 parts of the model run without gradients)"
    assert eager.fingerprint != compiled.fingerprint
    assert "compile" not in eager.config.to_dict()  # as in runs of older versions
    again, said = resolve(request, compiled, "cpu", 1)
    assert again.fingerprint == compiled.fingerprint
    assert said[0] == "compile on (as the run was made)"


def test_auto_compiles_long_runs_on_a_gpu() -> None:
    method, long = build("grad-cam", tiny(), layer="body"), EARNS * 120_000
    assert choose_compile(REQUEST, None, method, long, "cuda")[0]
    on, why = choose_compile(REQUEST, None, method, long // 10, "cuda")
    assert not on
    assert "about 54,545 images a worker" in why
    assert not choose_compile(replace(REQUEST, compile="off"), None, method, long, "cuda")[0]
    gradient = build("gradient", tiny())
    assert choose_compile(REQUEST, None, gradient, long, "cuda") == (
        False,
        "compile off (gradient runs no large part of Tiny without gradients)",
    )
    with pytest.raises(UserError, match="--compile on: gradient runs no large part"):
        choose_compile(replace(REQUEST, compile="on"), None, gradient, long, "cpu")


@pytest.mark.slow
def test_the_parts_of_each_method() -> None:
    resnet = load("resnet18", "none").model
    names = {module: name for name, module in resnet.named_modules()}
    stages = ["layer1", "layer2", "layer3", "layer4"]
    for method, given, expected in (
        ("grad-cam", {}, stages), ("grad-cam", {"layer": "layer2"}, stages[:2]), ("cam", {}, stages),
        ("eigen-cam", {"layer": "layer2"}, stages), ("layer-cam", {"layer": ["layer3", "layer2"]}, stages[:2]),
        ("occlusion", {}, [""]), ("lrp", {}, []), ("relevance-cam", {}, []), ("gradient", {}, []),
    ):  # fmt: skip
        assert [names[part] for part in build(method, resnet, **given).trunk()] == expected, method
    compiled = {name for name, kind in available().items() if kind.trunk is not Method.trunk}
    assert compiled == {
        "attention", "cam", "casm", "eigen-cam", "grad-cam", "grad-cam++", "grad-eclip", "hires-cam", "layer-cam",
        "localizer", "occlusion", "rise", "score-cam", "shapley-cam", "xgrad-cam",
    }  # fmt: skip


@pytest.mark.slow
def test_the_networks_of_casm_are_compiled_once(shapes: list[int], tmp_path: Path) -> None:
    request = casm_toys.request(casm_toys.write_shards(tmp_path / "in", 1), tmp_path / "out", epochs=1)
    train(request, casm_toys.quiet)
    with build("casm", load("casm_toys:small").model, checkpoint=str(tmp_path / "out")) as method:
        parts = method.trunk()
        expected = method(torch.zeros(2, 3, 64, 64))
        compiling.compile_parts(parts, deterministic=True)
        assert torch.equal(method(torch.zeros(2, 3, 64, 64)), expected)
    assert shapes == [2] * len(parts)
    assert len(parts) == 4  # the stages after the stem


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision", "tolerance"), [("grad-cam", "fp32", TOLERANCE), ("cam", "bf16", 0.03)])
def test_compiled_maps_are_nearly_the_eager_ones(method: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 6)
    maps = {}
    for compile in ("on", "off"):
        out = tmp_path / compile
        assert extract(tmp_path / "in", out, method=method, precision=precision, compile=compile) == 0
        table = pq.read_table(next(out.glob("data/*.parquet")))
        maps[compile] = np.stack([np.frombuffer(value, np.float32) for value in table["map"].to_pylist()])
    error = np.abs(maps["on"] - maps["off"]).max(1) / np.abs(maps["off"]).max(1)
    assert error.max() <= tolerance


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    def compile(function, **options):
        def fail(x):
            raise InternalTorchDynamoError("no working C++ compiler\nmore lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    write_shards(tmp_path / "in", 1, 2)
    with pytest.raises(UserError, match=r"no working C\+\+ compiler\); give --compile off"):
        extract(tmp_path / "in", tmp_path / "run", compile="on")
