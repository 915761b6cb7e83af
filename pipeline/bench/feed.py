"""Compare CASM's training that is fed from shards to its steps on one batch that is on the device already."""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from saltern.pipeline.bench.casm import CasmBench
from saltern.pipeline.bench.figures import Figure, by_turns, ratio
from saltern.pipeline.bench.workload import make_images, write_shards
from saltern.pipeline.casm.algorithm.hyperparameters import PRESETS, Hyperparameters
from saltern.pipeline.casm.algorithm.thinning import thinning_named
from saltern.pipeline.casm.training.plan import TrainingPlan, TrainRequest, make_plan
from saltern.pipeline.casm.training.trainee import build
from saltern.pipeline.device import arithmetic
from saltern.pipeline.models import classifiers
from saltern.pipeline.shards.resample import send
from saltern.pipeline.training.loop import Normalise, batches_of
from saltern.pipeline.training.ranks import Ranks

GOAL = 0.9
_STEPS = {"cpu": 4, "cuda": 64}  # of one round; the first batch is not decoded ahead
_IMAGES = 64  # different ones


def measure(bench: CasmBench, say: Callable[[str], None]) -> Figure:
    """Measure images/s of both, with thinning L, all of whose steps cost the same; bf16 on a GPU, fp32 on a CPU.

    Raises:
        UserError: a model that cannot be loaded, or has no stages.
    """
    with TemporaryDirectory(prefix="saltern-bench-") as folder:
        plan = _plan(bench, Path(folder), say)
        with arithmetic(plan.hyperparameters.precision):
            sides = Feed(plan, torch.device(bench.device), _STEPS[bench.device])
            sides.fed(), sides.alone()  # warm up
            fed, alone = by_turns(bench.rounds, sides.fed, sides.alone)
    precision, decoder = plan.hyperparameters.precision, plan.config["decoder"]
    note = f"{median(fed):.4g} ÷ {median(alone):.4g} images/s, {precision}, {decoder}"
    rounds = {"from shards": fed, "step alone": alone}
    return Figure("end to end from shards ÷ the step alone", ratio(fed, alone), GOAL, "x", True, note, rounds=rounds)


def _plan(bench: CasmBench, folder: Path, say: Callable[[str], None]) -> TrainingPlan:
    classes = classifiers.load(bench.model, "none").classes
    shards = write_shards(folder / "shards", make_images(_IMAGES), 4, max(_IMAGES, bench.batch_size), classes)
    precision = "bf16" if bench.device == "cuda" else "fp32"
    how = Hyperparameters(**{**PRESETS["steady"], "thinning": thinning_named("L"), "precision": precision})
    request = TrainRequest(
        shards=[str(shards)],
        out=str(folder / "out"),
        model=bench.model,
        hyperparameters=how,
        weights="none",
        labels="as-is",
        batch_size=bench.batch_size,
    )
    return make_plan(request, bench.device, None, say)


class Feed:
    """Both sides of the comparison, which train the same networks; each returns images/s."""

    def __init__(self, plan: TrainingPlan, device: torch.device, steps: int) -> None:
        ranks = Ranks(device)
        self._training, self._batches = build(plan, ranks), batches_of(plan, ranks)
        self._normalise, self._steps = Normalise(plan.config, device), steps

    def fed(self) -> float:
        """Train on batches from the shards."""
        device, since = self._training.device, time.perf_counter()
        with closing(self._batches.run(0, self._steps)) as stream:
            for batch in stream:
                self._training.step(self._normalise(batch.pixels_BHWC), send(batch.label_B, device))
        return self._rate(since)

    def alone(self) -> float:
        """Train on one batch."""
        batch = self._batches.read(0)
        x_BCHW, label_B = self._normalise(batch.pixels_BHWC), send(batch.label_B, self._training.device)
        self._wait()
        since = time.perf_counter()
        for _ in range(self._steps):
            self._training.step(x_BCHW, label_B)
        return self._rate(since)

    def _rate(self, since: float) -> float:
        self._wait()
        return self._steps * self._batches.batch_size / (time.perf_counter() - since)

    def _wait(self) -> None:
        if self._training.device.type == "cuda":
            torch.cuda.synchronize()


def as_line(figure: Figure) -> str:
    """Return the figure as a line of Markdown."""
    return f"{figure.name}: {figure.value:.3f} (>= {figure.goal}, {figure.verdict()}): {figure.note}"
