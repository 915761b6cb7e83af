"""`visualize-class`: classes in, the images that their logits like best out. A shard is a batch of classes.

Shape suffixes: B batch, C H W the network's input, K classes, T steps.
"""

import io
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saltern.pipeline.extract.extraction import load_model
from saltern.pipeline.extract.request import absolute, new_run, pin
from saltern.pipeline.extract.task import device_losses
from saltern.pipeline.machine import see_own_modules
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.runs.outlet import Outlet, Spec, Tally, origin
from saltern.pipeline.runs.reader import read_columns
from saltern.pipeline.runs.writer import Row
from saltern.pipeline.show.grid import png, publish_grid
from saltern.pipeline.storage.store import Store
from saltern.pipeline.synthesis.ascend import Ascent, Peak, ascend, start
from saltern.schemas.choices import FirstImage, check_choice
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import CLASSES, VISUALIZE, Run, RunConfig, Shard
from saltern.schemas.saliency import NONFINITE, OK, with_metadata
from saltern.schemas.visualization import visualization_schema

BATCH_SIZE = {"cpu": 8, "cuda": 64}  # classes
SHOWN = 64  # images of the contact picture


@dataclass(frozen=True)
class VisualizeRequest:
    """What the user asked for; None where the default, or the standing run, decides."""

    classes: str
    model: str
    weights: str = "DEFAULT"
    crop: int | None = None
    steps: int = 200
    step_size: float = 1.0
    weight: float = 1e-3
    init: str = "zero"
    seed: int = 0
    pinned: dict[str, int | None] = field(default_factory=dict)  # batch_size, torch_threads


def parse_classes(text: str, classes: int) -> list[int]:
    """`243,281`, `0-9`, `@file` of such words, or `all`, each class once, in ascending order. Raises UserError."""
    if text == "all":
        return list(range(classes))
    words = text
    if text.startswith("@"):
        try:
            words = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {text}: {error}") from error
    found: set[int] = set()
    for word in re.split(r"[,\s]+", words.strip(", \n\t")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--classes {text}: {word!r} is no class; give numbers and ranges, as 243,281,0-9, or all")
        if last >= classes:
            raise UserError(f"--classes {text}: {last} is out of range: the model has classes 0..{classes - 1}")
        found.update(range(first, last + 1))
    return sorted(found)


def plan(request: VisualizeRequest, standing: Run | None, device: str, workers: int) -> tuple[Run, list[str]]:
    """The run that is asked for. Raises UserError where something that was asked for cannot be had."""
    check_choice("--init", request.init, FirstImage)
    if request.steps < 1 or request.step_size <= 0 or request.weight < 0:
        raise UserError("--steps must be at least 1, --step-size larger than 0, --lambda at least 0")
    see_own_modules()
    classifier = classifiers.load(request.model, request.weights, seed=request.seed)
    targets = parse_classes(request.classes, classifier.classes)
    pinned = pin(request.pinned, standing, device, workers, BATCH_SIZE)
    usual = classifier.preprocess
    config = RunConfig(
        model=request.model,
        weights=absolute(request.weights),
        weights_digest=classifier.digest,
        classes=classifier.classes,
        method="",
        layer=[],
        options={},
        target="",
        discretize="",
        map_size="",
        map_dtype="",
        save_map=False,
        resize=usual.resize,
        crop=request.crop or usual.crop,
        squash=False,
        interpolation=usual.interpolation,
        mean=list(usual.mean),
        std=list(usual.std),
        precision="fp32",
        seed=request.seed,
        limit=None,
        job=VISUALIZE,
        job_options={
            "steps": request.steps,
            "step_size": request.step_size,
            "weight": request.weight,
            "init": request.init,
        },
        **pinned,
    )
    size = pinned["batch_size"]
    shards = [_shard(number, targets[at : at + size]) for number, at in enumerate(range(0, len(targets), size))]
    return new_run(config, shards, classifier.class_names), []


def _shard(number: int, targets: list[int]) -> Shard:
    return Shard(f"classes-{number:06}", CLASSES + ",".join(map(str, targets)), len(targets))


def targets_of(shard: Shard) -> list[int]:
    """The classes of a shard, by its URL."""
    return [int(word) for word in shard.url.removeprefix(CLASSES).split(",")]


class Visualizer:
    """Ascends batches of classes with a resident classifier. `process` may run in two threads at once.

    Raises:
        UserError: the model or its weights cannot be had here, or the weights are not the driver's.
    """

    def __init__(self, spec: Spec):
        self._run, self._config = spec.run, spec.run.config
        self._how = Ascent(**self._config.job_options)
        self.images = 0  # classes that are done, for progress
        self._outlet = Outlet(spec)
        self._device = torch.device(spec.device)
        # torch keeps its thread count for each calling thread: set it in the one that computes.
        threads = self._config.torch_threads
        self._compute = ThreadPoolExecutor(1, "saltern-device", lambda: torch.set_num_threads(threads))
        self._model = self._compute.submit(load_model, self._config, self._device).result()
        self._schema = with_metadata(visualization_schema(), origin(spec.run))

    def process(self, shard: Shard, redo: bool = False) -> Receipt:
        """Visualize one batch of classes: pictures, data file, receipt, each whole or not at all.

        Raises:
            MemoryError: the batch does not fit in the device's memory.
            OutputError: the run's folder takes no more.
            DeviceLostError: this process must be given up.
        """
        tally = Tally()
        with self._outlet.open(self._schema, tally) as writer:
            peak, seconds = self._compute.submit(self._ascend, targets_of(shard)).result()
            tally.seconds["compute"] += seconds
            with self._outlet.writing(tally):
                rows = self._rows(shard, peak)
                writer.write(rows)
            for row in rows:
                found = dict(zip(self._schema.names, row, strict=True))
                if found["image"] is not None:
                    self._outlet.publish(found["image"], f"pictures/{picture_name(found)}", tally)
            tally.count(len(rows), rows)
            written = self._outlet.close(shard, writer, tally)
        self.images += len(rows)
        return self._outlet.hand_in(shard, written, tally, self._config.batch_size)

    def _ascend(self, targets: list[int]) -> tuple[Peak, float]:
        since = time.perf_counter()
        target_B = torch.tensor(targets)
        first_BCHW = start(target_B, (3, self._config.crop, self._config.crop), self._how.init, self._config.seed)

        def logits(image_BCHW: Tensor) -> Tensor:
            return logits_of(self._model(image_BCHW))

        try:
            with device_losses(), torch.enable_grad(), frozen(self._model):
                peak = ascend(logits, first_BCHW.to(self._device), target_B.to(self._device), self._how)
                return peak.to_host(), time.perf_counter() - since
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{len(targets)} classes do not fit in memory: give a smaller --batch-size") from error

    def _rows(self, shard: Shard, peak: Peak) -> list[Row]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self._config.mean, self._config.std))
        levels_BCHW = ((peak.image_BCHW * std + mean).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        pixels_BHWC = levels_BCHW.permute(0, 2, 3, 1).numpy()
        names = self._run.class_names
        rows = []
        for index, target in enumerate(targets_of(shard)):
            curve = peak.objective_BT[index].tolist()
            fine = bool(np.isfinite(curve).all())
            made: dict[str, Any] = {
                "key": str(target),
                "shard": shard.name,
                "index": index,
                "target": target,
                "class_name": names[target] if names else None,
                "objective": curve,
                "status": OK if fine else NONFINITE,
                "error": None if fine else "the ascent left the finite numbers: give a smaller --step-size",
            }
            if fine:
                made |= {
                    "logit": peak.logit_B[index].item(),
                    "score": peak.probability_B[index].item(),
                    "objective_start": curve[0],
                    "objective_end": curve[-1],
                    "image": png(pixels_BHWC[index]),
                }
            rows.append(tuple(made.get(name) for name in self._schema.names))
        return rows


def picture_name(row: dict[str, Any]) -> str:
    """`<class>-<name>.png` of a row."""
    slug = re.sub(r"[^a-z0-9]+", "-", (row["class_name"] or "class").lower()).strip("-")
    return f"{row['target']:04}-{slug}.png"


def close(store: Store, run: Run, scratch: Path) -> None:
    """A contact picture of the first classes, and the last line."""
    columns = ["key", "target", "class_name", "score", "objective_start", "objective_end", "status"]
    rows = [row for row in read_columns(store, run, columns) if row["status"] == OK]
    if not rows:
        return
    rose = sum(row["objective_end"] > row["objective_start"] for row in rows)
    mean = sum(row["score"] for row in rows) / len(rows)
    print(f"{len(rows)} classes; the objective rose in {rose}; mean probability of the class {100 * mean:.2f} %")
    shown = [row for row in read_columns(store, run, [*columns, "image"], SHOWN) if row["status"] == OK]
    cells = [
        (f"{row['target']} {row['class_name'] or ''} {100 * row['score']:.1f} %", Image.open(io.BytesIO(row["image"])))
        for row in shown
    ]
    publish_grid(store, scratch, "pictures.png", cells, columns=min(8, len(cells)))
