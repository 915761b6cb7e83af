"""A small run to learn from, with boxes in its shards, and requests for localizers."""

import json
from pathlib import Path

import numpy as np
from casm_toys import SIDE
from making import picture, write_tar

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest
from saltern.pipeline.localizer.hyperparameters import Hyperparameters
from saltern.pipeline.localizer.step import LocalizerTraining
from saltern.pipeline.localizer.train import TrainRequest


def write_shards(folder: Path, count: int, each: int, first: int = 0) -> Path:
    """Write shards of photographs of several sizes, each with a box."""
    for shard in range(count):
        samples = []
        for number in range(first + shard * each, first + (shard + 1) * each):
            width, height = 72 + number % 3 * 10, 72 + number % 2 * 20
            box = [number % 5 * 4, 8, width - 20, height - 6 - number % 4 * 5]
            content = json.dumps({"boxes": [box], "height": height, "width": width})
            samples.append((f"k{number:03}", {"jpg": picture(number, height, width), "cls": "1", "json": content}))
        write_tar(folder / f"{shard}.tar", samples)
    return folder


def extract(shards: Path, out: Path, **wishes: object) -> Path:
    """Make a run of Grad-CAM on the network of CASM's toys."""
    usual = {"model": "casm_toys:calm", "method": "grad-cam", "layer": "stages.2", "resize": SIDE, "crop": SIDE}
    request = ExtractRequest(**{"shards": [str(shards)], "torch_threads": 1, **usual, **wishes})  # type: ignore[arg-type]
    assert conduct(extraction(request), RunOptions(str(out), device="cpu", engine="local")).code == 0
    return out


def request(run: Path, out: Path, **changed: object) -> TrainRequest:
    """Return a request for 9 steps, with a checkpoint after every fourth."""
    usual = {"epochs": 3, "steps_per_epoch": 3, "batch_size": 4, "checkpoint_every": 4, "device": "cpu"}
    hyperparameters = changed.pop("hyperparameters", Hyperparameters(seed=3))
    return TrainRequest(
        run=str(run), out=str(out), hyperparameters=hyperparameters, **{"decode_threads": 2, **usual, **changed}
    )


def naive_targets(
    kind: str, map_hw: np.ndarray, box: list[float], geometry: list[float], side: int, crop: list[float], cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of one crop and where it is known, cell by cell; crop: scale and offset of shares of the crop."""
    mask, known = np.zeros((cells, cells)), np.zeros((cells, cells))
    for row in range(cells):
        for column in range(cells):
            x = crop[2] + crop[0] * (column + 0.5) / cells
            y = crop[3] + crop[1] * (row + 0.5) / cells
            u, v = (x - geometry[2]) / (geometry[0] * side), (y - geometry[3]) / (geometry[1] * side)
            known[row, column] = 0 <= u <= 1 and 0 <= v <= 1
            if kind == "boxes":
                mask[row, column] = box[0] <= x < box[2] and box[1] <= y < box[3]
            else:
                mask[row, column] = _bilinear(map_hw, u, v)
    return mask, known


def _bilinear(map_hw: np.ndarray, u: float, v: float) -> float:
    height, width = map_hw.shape
    x, y = min(max(u * width - 0.5, 0), width - 1), min(max(v * height - 0.5, 0), height - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    across = [map_hw[at, left] * (1 - (x - left)) + map_hw[at, right] * (x - left) for at in (top, bottom)]
    return float(across[0] * (1 - (y - top)) + across[1] * (y - top))


class CutError(Exception):
    """The error that `interrupt` raises."""


def interrupt(monkeypatch, step: int) -> None:
    """Raise CutError when a training reaches this step."""
    real = LocalizerTraining.step

    def cut(self, x_BCHW, wanted):
        if self.steps_done == step:
            raise CutError
        return real(self, x_BCHW, wanted)

    monkeypatch.setattr(LocalizerTraining, "step", cut)
