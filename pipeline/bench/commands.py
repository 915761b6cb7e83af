"""Run `saltern` commands as a user does; measure seconds, memory, images/s, and the gain of training workers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from saltern.pipeline.bench.figures import by_turns
from saltern.pipeline.bench.workload import make_images, option_words, write_shards
from saltern.pipeline.engine.driver import IN_FLIGHT
from saltern.pipeline.machine import cores
from saltern.pipeline.training.journal import EVERY
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import PHASES, Receipt

# A process starts with the peak of its parent, so that a small process must start the command.
_LAUNCH = """
import json, os, subprocess, sys, time
cores = int(sys.argv[1])
if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
since = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
said = process.stderr.read()
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - since, used.ru_maxrss, status, said.decode()[-300:]]))
"""


class Used(NamedTuple):
    """Time and memory of a command."""

    seconds: float
    peak_mb: float  # resident


def run_command(words: Sequence[str], on_cores: int = 0, torch_threads: int | None = None) -> Used:
    """Run a command; `on_cores` limits the cores of it and of all that it starts. Raises UserError if it fails."""
    threads = {} if torch_threads is None else {"OMP_NUM_THREADS": str(torch_threads)}
    launch = [sys.executable, "-c", _LAUNCH, str(on_cores), *words]
    ended = subprocess.run(launch, check=True, capture_output=True, env=os.environ | threads)
    seconds, peak_kb, status, said = json.loads(ended.stdout)
    if status:
        raise UserError(f"cannot measure: `{' '.join(words)}` failed: {' '.join(said.split())}")
    return Used(seconds, peak_kb * 1024 / 1e6)


class RunRate(NamedTuple):
    """The speed of a run, without its start and its end."""

    images_s: float
    thread_ms: dict[str, float]  # an image, by phase


def measure_run(extract: Sequence[str], on_cores: int = 0, torch_threads: int = 1) -> RunRate:
    """Run `saltern extract` and return its speed, without the starts and the ends of its workers.

    Args:
        extract: the command, except --out.
        on_cores: cores that the run has; 0: all.
        torch_threads: of each worker.

    Raises:
        UserError: the command failed, or no worker had enough shards.
    """
    with TemporaryDirectory(prefix="saltern-bench-") as out:
        run_command([*extract, "--out", out], on_cores, torch_threads)
        paths = sorted(Path(out, "receipts").rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        receipts = [(path.stat().st_mtime_ns / 1e9, Receipt.from_json(path.read_bytes())) for path in paths]
    rate = 0.0
    for worker in {receipt.worker for _, receipt in receipts}:
        own = [(ended, receipt) for ended, receipt in receipts if receipt.worker == worker]
        # A worker has IN_FLIGHT shards at once until the queue is empty. Its first and its last ones are left out.
        steady = own[IN_FLIGHT - 1 : len(own) - IN_FLIGHT]
        if len(steady) > 1:
            rate += sum(receipt.samples for _, receipt in steady[1:]) / (steady[-1][0] - steady[0][0])
    if not rate:
        raise UserError(f"cannot measure on {len(receipts)} shards: no worker had {2 * IN_FLIGHT + 1}")
    images = sum(receipt.samples for _, receipt in receipts)
    phases = {name: 1000 * sum(receipt.seconds[name] for _, receipt in receipts) / images for name in PHASES}
    return RunRate(rate, phases)


@dataclass(frozen=True)
class TrainingBench:
    """Trainings of CASM by several workers and by one, at the same global batch."""

    command: Sequence[str]  # that runs `saltern`
    workers: int = 2
    model: str = "resnet50"
    device: str = "cpu"
    batch_size: int = 32  # of all workers together
    side: int = 64  # pixels: in a small step, the exchange of gradients weighs more than at 224
    readings: int = 2  # of a run's speed; one more, the first, is left out
    rounds: int = 3
    images: int = 256  # in four shards, small, so that decoding costs little


def training_gain(bench: TrainingBench) -> dict[str, Any]:
    """Return images/s with several workers ÷ with one; or `skipped`, the reason."""
    kind, present = ("GPU", torch.cuda.device_count()) if bench.device == "cuda" else ("core", cores())
    lacking = f"{bench.workers} workers, and {present} {kind}{'s' * (present != 1)}"
    entry: dict[str, Any] = {"workers": bench.workers, "skipped": lacking if present < bench.workers else None}
    if entry["skipped"]:
        return entry
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        shards = write_shards(Path(folder, "shards"), make_images(bench.images, 150, 200), 4, bench.images // 4)
        try:
            many, one = by_turns(
                bench.rounds, lambda: _train(bench, shards, bench.workers), lambda: _train(bench, shards, 1)
            )
        except UserError as error:
            return {**entry, "skipped": str(error)}
    rates = {bench.workers: list(chain(*many)), 1: list(chain(*one))}
    speeds = {workers: median(values) for workers, values in rates.items()}
    return {**entry, "images_per_s": speeds, "gain": speeds[bench.workers] / speeds[1], "rounds": rates}


def _train(bench: TrainingBench, shards: Path, workers: int) -> list[float]:
    """Return images/s of a training, without its start. On a CPU, each worker has one core and one thread."""
    options = {name: getattr(bench, name) for name in ("model", "device", "batch_size", "side")}
    options |= {"weights": "none", "epochs": 1, "steps_per_epoch": EVERY * (1 + bench.readings)}
    options |= {"decode_threads": 1, "workers": workers}
    with TemporaryDirectory(prefix="saltern-bench-") as out:
        words = [*bench.command, "train-casm", str(shards), "--out", out, *option_words(options)]
        run_command(words, *((workers, 1) if bench.device == "cpu" else ()))
        lines = Path(out, "speed.jsonl").read_text().splitlines()
    return [json.loads(line)["images_per_s"] for line in lines][1:]


def training_line(entry: dict[str, Any], bench: TrainingBench) -> str:
    """Return the entry as a line of Markdown."""
    name = f"train-casm, {entry['workers']} workers ÷ 1 worker at the same global batch"
    if entry["skipped"]:
        return f"- {name}: skipped, {entry['skipped']}."
    speeds = entry["images_per_s"]
    each = "a core and a torch thread each" if bench.device == "cpu" else "a GPU each"
    return (
        f"- {name}: {entry['gain']:.2f} x ({speeds[entry['workers']]:.1f} ÷ {speeds[1]:.1f} images/s; {each}, L100, "
        f"fp32, {bench.model} at {bench.side} x {bench.side}, batch {bench.batch_size} in all; no goal is set)."
    )
