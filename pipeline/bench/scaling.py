"""What a training of CASM gains from a second worker: `saltern train-casm` itself, on made shards."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from saltern.pipeline.bench.workload import make_shards
from saltern.pipeline.casm.training.journal import EVERY
from saltern.schemas.errors import UserError

_SHARDS, _IMAGES = 4, 64  # of each shard
_HEIGHT, _WIDTH = 150, 200  # so that decoding is no part of what is measured


@dataclass(frozen=True)
class Scaling:
    """What to measure on."""

    command: Sequence[str]  # that runs `saltern`
    workers: int = 2
    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 32  # of all workers together
    side: int = 64  # pixels: a small step, beside which the exchange of gradients weighs more than at 224
    readings: int = 2  # of a run's speed, each over so many steps as train-casm logs at once; one more goes before
    rounds: int = 3


def measure(scaling: Scaling) -> dict[str, Any]:
    """images/s with so many workers ÷ with one, at the same global batch; or `skipped`, the reason."""
    entry: dict[str, Any] = {"workers": scaling.workers, "skipped": _lacking(scaling)}
    if entry["skipped"]:
        return entry
    rates: dict[int, list[float]] = {scaling.workers: [], 1: []}
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        make_shards(Path(folder, "shards"), _SHARDS, _IMAGES, _HEIGHT, _WIDTH)
        try:
            for number in range(scaling.rounds):
                for workers in rates if number % 2 == 0 else reversed(rates):
                    rates[workers] += _train(scaling, Path(folder, "shards"), workers)
        except UserError as error:
            return {**entry, "skipped": str(error)}
    speeds = {workers: median(found) for workers, found in rates.items()}
    gain = speeds[scaling.workers] / speeds[1]
    return {**entry, "images_per_s": speeds, "gain": gain, "rounds": rates}


def _lacking(scaling: Scaling) -> str | None:
    kind = "GPU" if scaling.device == "cuda" else "core"
    there = torch.cuda.device_count() if scaling.device == "cuda" else len(os.sched_getaffinity(0))
    return f"{scaling.workers} workers, and {there} {kind}{'s' * (there != 1)}" if there < scaling.workers else None


def _train(scaling: Scaling, shards: Path, workers: int) -> list[float]:
    """Readings of images/s once the training is under way; on a CPU with a core and a thread for each worker."""
    steps = EVERY * (1 + scaling.readings)
    options = {
        "model": scaling.model,
        "weights": "none",
        "batch-size": scaling.batch_size,
        "side": scaling.side,
        "epochs": 1,
        "steps-per-epoch": steps,
        "decode-threads": 1,
        "device": scaling.device,
        "workers": workers,
    }
    every = os.sched_getaffinity(0)
    with TemporaryDirectory(prefix="saltern-bench-") as out:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        try:
            if scaling.device == "cpu":
                os.sched_setaffinity(0, sorted(every)[:workers])  # what is started inherits it
            ended = subprocess.run(
                [*scaling.command, "train-casm", str(shards), "--out", out, *words],
                env={**os.environ, "OMP_NUM_THREADS": "1"} if scaling.device == "cpu" else None,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            os.sched_setaffinity(0, every)
        if ended.returncode:
            said = " ".join(ended.stderr.split())[-300:]
            raise UserError(f"train-casm --workers {workers} failed: {said}")
        lines = Path(out, "speed.jsonl").read_text().splitlines()
    return [json.loads(line)["images_per_s"] for line in lines][1:]


def as_line(entry: dict[str, Any], scaling: Scaling) -> str:
    """The entry in words."""
    name = f"train-casm, {entry['workers']} workers ÷ 1 worker at the same global batch"
    if entry["skipped"]:
        return f"- {name}: skipped, {entry['skipped']}."
    speeds = entry["images_per_s"]
    where = "a core and a torch thread each" if scaling.device == "cpu" else "a GPU each"
    return (
        f"- {name}: {entry['gain']:.2f} x ({speeds[entry['workers']]:.1f} ÷ {speeds[1]:.1f} images/s; {where}, L100, "
        f"fp32, {scaling.model} at {scaling.side} x {scaling.side}, batch {scaling.batch_size} in all; no goal is set)."
    )
