"""A small training: shards whose labels the classifier mostly knows, and a request."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from making import picture, write_tar
from torch import Tensor, nn

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import Thinning
from saltern.pipeline.casm.training.train import TrainRequest
from saltern.pipeline.shards.decode import decode
from saltern.schemas.config import Preprocess

if TYPE_CHECKING:
    import pytest

OFTEN = Thinning("T", True, 0.6, 2, 3.0, 9)  # snapshots every other step: a small pool is soon full
SIDE = 64


class Small(nn.Module):
    """Stages at strides 4 to 32, six classes, dropout."""

    image_size = SIDE

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, step, 1), nn.BatchNorm2d(width), nn.ReLU())
            for step in (1, 2, 2, 2)
        )
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.fc(self.dropout(x.mean((2, 3))))
        return logits


def _made(width: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        net = Small(width)
        nn.init.normal_(net.fc.weight, 0, 3)
    return net.eval()


def small() -> nn.Module:
    return _made(6)


def slow() -> nn.Module:
    """Return `small` with a delay, so that a fault can happen during a step."""
    net = small()
    net.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return net


def calm() -> nn.Module:
    """Return `small` without dropout, whose random numbers depend on how ranks share a batch."""
    net = small()
    net.dropout = nn.Identity()
    return net


def other() -> nn.Module:
    """Return a network of the same kind with another width."""
    return _made(8)


def write_shards(folder: Path, count: int = 3, each: int = 8) -> Path:
    """Write shards. Every third label cycles through the classes; the others are the predictions of `small`."""
    net = small()
    with torch.no_grad():
        for shard in range(count):
            samples = []
            for number in range(shard * each, (shard + 1) * each):
                image = picture(number, 72, 72)
                pixels = decode(image, Preprocess(SIDE, SIDE)).pixels_HWC
                x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.45) / 0.225
                label = number // 3 % 6 if number % 3 == 0 else int(net(x).argmax())
                samples.append((f"k{number:03}", {"jpg": image, "cls": str(label)}))
            write_tar(folder / f"{shard}.tar", samples)
    return folder


def files(root: Path) -> dict[str, str]:
    """Return the digests of a training's files by name, except for that of its speed."""
    found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if name != "speed.jsonl"
    }


def request(shards: Path, out: Path, **changed: object) -> TrainRequest:
    hyperparameters = changed.pop(
        "hyperparameters", Hyperparameters(thinning=OFTEN, lam="auto", pool_size=3, lr_classifier=0.01, seed=5)
    )
    usual = {
        "model": "casm_toys:small",
        "epochs": 3,
        "steps_per_epoch": 6,
        "batch_size": 4,
        "side": SIDE,
        "checkpoint_every": 4,
    }
    given = {**usual, "device": "cpu", "decode_threads": 2, **changed}
    return TrainRequest(shards=[str(shards)], out=str(out), hyperparameters=hyperparameters, **given)


def quiet(text: str) -> None:
    """Ignore a line for the user."""


def log_lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]


class CutError(Exception):
    """The error that `interrupt` raises."""


def interrupt(monkeypatch: "pytest.MonkeyPatch", step: int, error: Callable[[], BaseException] = CutError) -> None:
    """Raise the error when a training reaches this step."""
    real = Training.step

    def cut(self: Training, x_BCHW: Tensor, label_B: Tensor) -> object:
        if self.steps_done == step:
            raise error()
        return real(self, x_BCHW, label_B)

    monkeypatch.setattr(Training, "step", cut)
