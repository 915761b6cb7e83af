"""The presets of `train-casm`: the paper's settings to the letter, and the defaults."""

from pathlib import Path

import pytest
from commands import call

from saltern.pipeline.casm.training import train as module
from saltern.pipeline.casm.training.train import TrainRequest

# Zolna 2020, section 4.1 and its published code.
PAPER = {
    "score": "entropy", "pull": 0.0, "pool_size": 30, "pool_half": False, "classifier_loss": "sequential",
    "share_encoder": True, "init_scale": 1.0, "tv": 0.0, "batch_norm": "train", "precision": "fp32",
    "lr_classifier": 1e-3, "momentum": 0.9, "lr_mask": 1e-3, "weight_decay": 1e-4, "clip": 10.0,
}  # fmt: skip
STEADY = {
    "score": "classification", "pull": 1.0, "init_scale": 0.01, "tv": 8.0, "batch_norm": "eval", "lr_classifier": 2e-4,
    "lr_mask": 3e-4, "mask_area": 0.5,
}  # fmt: skip
LAMBDAS = {"F": (2.5, 9), "L": (14, 18), "FL": (7.5, 11), "L1000": (10, 17), "L100": (10, 17)}


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[TrainRequest]:
    """Return the requests that the command makes."""
    requests: list[TrainRequest] = []
    monkeypatch.setattr(module, "train", lambda request: requests.append(request) or Path("casm/checkpoints/1"))
    return requests


def train(*words: str) -> None:
    ended = call("train-casm", "shards", "--out", "casm", "--model", "resnet50", *words)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("thinning", LAMBDAS)
def test_published_has_the_settings_of_the_paper(thinning: str, requested: list[TrainRequest]) -> None:
    train("--preset", "published", "--thinning", thinning)
    train("--preset", "published", "--thinning", thinning, "--score", "classification")
    (request, other), how = requested, requested[0].hyperparameters
    assert {name: getattr(how, name) for name in PAPER} == PAPER
    assert (how.start_lambda(), other.hyperparameters.start_lambda()) == LAMBDAS[thinning]
    assert how.lam != "auto"
    assert how.pulling == 0
    assert (how.thinning.trained, how.thinning.hp) == (
        thinning != "F",
        0.5 if thinning in ("FL", "L1000", "L100") else 0,
    )
    assert how.thinning.save_every == {"L1000": 1000, "L100": 100}.get(thinning)
    assert (request.epochs, request.batch_size, request.min_crop, request.side) == (60, 128, 0.08, None)


def test_steady_is_the_default_and_what_is_given_replaces_it(requested: list[TrainRequest]) -> None:
    train()
    train("--tv", "2", "--lambda", "5", "--batch-norm", "train")
    how, other = (request.hyperparameters for request in requested)
    assert {name: getattr(how, name) for name in STEADY} == STEADY
    assert (how.lam, how.thinning.name) == ("auto", "L100")
    assert (other.tv, other.lam, other.batch_norm, other.pulling) == (2.0, 5.0, "train", 0.0)
