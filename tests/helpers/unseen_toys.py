"""A small experiment on unseen classes: a model of twelve classes, its shards, a request."""

import json
import random
from pathlib import Path

import torch
from casm_toys import SIDE, Small, quiet
from making import picture, write_tar
from torch import nn

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.pipeline.casm.training.train import TrainRequest
from saltern.pipeline.casm.unseen.experiment import Unseen, unseen_classes

CLASSES = 12  # of the model; the last two are in no training shard
SPLIT = 10
STEPS = 4


class Wide(Small):
    """`Small` with twelve classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = Wide()
        nn.init.normal_(net.fc.weight, 0, 3)
    return net.eval()


def write_train(folder: Path) -> Path:
    for shard in range(2):
        numbers = range(shard * SPLIT, (shard + 1) * SPLIT)
        write_tar(
            folder / f"{shard}.tar", [(f"t{i}", {"jpg": picture(i, 72, 72), "cls": str(i % SPLIT)}) for i in numbers]
        )
    return folder


def box(draw: random.Random) -> list[int]:
    x0, y0 = draw.randrange(40), draw.randrange(40)
    return [x0, y0, draw.randrange(x0 + 15, 76), draw.randrange(y0 + 15, 72)]


def write_val(folder: Path, drop: int | None = None, boxless: int | None = None, **odd: str) -> Path:
    """Write three shards with six images of each class. In each shard one image has no boxes and one is damaged.

    Args:
        drop: a class that is left out.
        boxless: a class without boxes.
        odd: members of one more sample.
    """
    draw = random.Random(1)
    for shard in range(3):
        samples = []
        for number in range(2 * CLASSES):
            boxes = [box(draw) for _ in range(0 if number == 3 else 1 + 2 * (number % 3))]
            label = number % CLASSES
            if label != drop:
                image = b"damaged" if number == 5 else picture(100 * shard + number, 72, 76)
                found = json.dumps({"boxes": [] if label == boxless else boxes})
                samples.append((f"v{number}", {"jpg": image, "cls": str(label), "json": found}))
        write_tar(folder / f"val-{shard}.tar", [*samples, *([("odd", odd)] if odd else [])])
    return folder


def request(data: Path, out: Path, **changed: object) -> TrainRequest:
    hyperparameters = Hyperparameters(thinning=THINNINGS["L"], lam="auto", lr_classifier=0.01, lr_mask=0.02, seed=5)
    usual = {"epochs": 2, "steps_per_epoch": 2, "batch_size": 4, "side": SIDE, "device": "cpu"}
    return TrainRequest(
        shards=[str(data / "train")],
        out=str(out),
        model="unseen_toys:wide",
        hyperparameters=changed.pop("hyperparameters", hyperparameters),
        **usual | changed,
    )


def run(data: Path, out: Path, **changed: object) -> Unseen:
    return unseen_classes(request(data, out, **changed), [str(data / "val")], quiet)
