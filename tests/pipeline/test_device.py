"""The arithmetic of a process: what `--precision` and determinism set, and that torch's settings come back."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import casm_toys
import pytest
import torch
import watching
from extracting import extract
from making import HELPERS, write_shards

from saltern.pipeline.casm.training.train import train
from saltern.pipeline.device import arithmetic, memory_format
from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.synthesis.attack import AttackRequest, attacking
from saltern.pipeline.synthesis.visualize import VisualizeRequest, visualizing
from saltern.schemas.config import PGD, Ascent
from saltern.schemas.errors import UserError


def settings() -> dict[str, object]:
    return {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "tuned": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize(
    ("precision", "convolutions", "products"),
    [("fp32", False, False), ("tf32", True, True), ("bf16", True, False), ("fp16", True, False)],
)
def test_a_precision_sets_tf32_and_gives_it_back(precision: str, convolutions: bool, products: bool) -> None:
    before = settings()
    with arithmetic(precision):
        inside = settings()
        # The newer names of the same flags agree: torch.compile refuses a mixture of both.
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == convolutions
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == products
    assert (inside["convolutions"], inside["products"]) == (convolutions, products)
    assert settings() == before


def test_determinism_is_by_errors_and_ends_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    inside: dict[str, object] = {}
    with contextlib.suppress(ZeroDivisionError), arithmetic(threads=2):
        inside |= settings()
        raise ZeroDivisionError
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert inside | {"deterministic": True, "warns": False, "cudnn": True, "tuned": False, "threads": 2} == inside
    with arithmetic(deterministic=False):
        assert settings() | {"deterministic": False, "cudnn": False, "tuned": False} == settings()
    assert settings() == before


def test_an_operation_that_does_not_repeat_is_refused_by_name() -> None:
    said = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set 'torch..."
    with pytest.raises(UserError) as refused, arithmetic(what="grad-cam of my:net"):
        raise RuntimeError(said)
    assert str(refused.value).startswith("grad-cam of my:net needs adaptive_max_pool2d_backward_cuda, which")
    assert "--no-deterministic" in str(refused.value)
    said = "Deterministic behavior was enabled, but ... To enable it, you must set CUBLAS_WORKSPACE_CONFIG=:4096:8"
    with pytest.raises(UserError, match="this process used CUDA before"), arithmetic():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="another fault"), arithmetic():
        raise RuntimeError("another fault")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[watching.Note]:
    monkeypatch.chdir(HELPERS)
    watching.NOTES.clear()
    return watching.NOTES


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_extract_computes_as_its_precision_says(precision: str, notes: list[watching.Note], tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 3)
    assert extract(tmp_path / "in", tmp_path / "run", model="watching:tiny", precision=precision) == 0
    assert {tf32 for tf32, _, on_device, _ in notes if on_device} == {precision == "tf32"}


@pytest.mark.slow
def test_extract_repeats_to_the_bit_unless_told_otherwise(notes: list[watching.Note], tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2, 2)
    for given, kept in ((None, True), (False, False)):
        out = tmp_path / f"run-{kept}"
        for again in (given, None):  # a resumed run keeps what it had
            notes.clear()
            assert extract(tmp_path / "in", out, model="watching:tiny", deterministic=again) == 0
            assert {repeats for _, repeats, on_device, _ in notes if on_device} == {kept}
            next(out.glob("receipts/*.json")).unlink()
    with pytest.raises(UserError, match="deterministic: False there, True requested"):
        extract(tmp_path / "in", out, model="watching:tiny", deterministic=True)
    made = [load_run_folder(str(tmp_path / f"run-{kept}"))[1] for kept in (True, False)]
    assert made[0].fingerprint == made[1].fingerprint
    assert [run.config.to_dict().get("deterministic") for run in made] == [True, None]  # as runs of older versions


@pytest.mark.parametrize("kind", ["attack", "visualize-class"])
def test_jobs_without_the_option_compute_in_float32(kind: str, notes: list[watching.Note], tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 1, 2)
    ascent, pgd = Ascent(2, 0.1, 0.0, "zero"), PGD(2, 0.01, 0.1, 1.0)
    if kind == "attack":
        request = AttackRequest([str(tmp_path / "in")], "watching:tiny", "grad-cam", layer="body", crop=32, pgd=pgd)
        job = attacking(replace(request, resize=40, batch_size=2, torch_threads=1))
    else:
        job = visualizing(VisualizeRequest("0,1", "watching:tiny", crop=32, ascent=ascent, torch_threads=1))
    assert conduct(job, RunOptions(str(tmp_path / "run"), device="cpu", engine="local")).code == 0
    assert {(tf32, repeats) for tf32, repeats, on_device, _ in notes if on_device} == {(False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_training_computes_as_its_precision_says(precision: str, notes: list[watching.Note], tmp_path: Path) -> None:
    shards = casm_toys.write_shards(tmp_path / "in", 1, 6)
    request = casm_toys.request(shards, tmp_path / "out", model="watching:small", epochs=1, steps_per_epoch=1)
    train(replace(request, hyperparameters=replace(request.hyperparameters, precision=precision)))
    assert [note[:2] for note in notes if note[3]][-1] == (precision == "tf32", True)


def test_on_a_cpu_tf32_has_the_layout_of_fp32() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert memory_format("tf32", cpu) == memory_format("fp32", cpu) == memory_format("fp32", cuda)
    assert {memory_format("tf32", cuda), memory_format("bf16", cpu)} == {torch.channels_last}
