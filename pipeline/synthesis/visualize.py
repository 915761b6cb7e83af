"""The job `visualize-class`: makes the image with the largest logit of each class. A shard is a batch of classes.

Shape suffixes: B batch, C H W the network's input, K classes, T steps.
"""

import io
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saltern.pipeline.device import arithmetic, faults, out_of_memory
from saltern.pipeline.engine.conduct import Job
from saltern.pipeline.extract.extraction import load_model
from saltern.pipeline.extract.request import load_classifier, model_fields, pin
from saltern.pipeline.extract.tryout import is_proven, try_gradient
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.models.presets import adapt
from saltern.pipeline.runs.begin import new_run
from saltern.pipeline.runs.columns import Record, from_records
from saltern.pipeline.runs.datafile import data_schema
from saltern.pipeline.runs.manifest import picture_name
from saltern.pipeline.runs.outlet import Made, Outlet, Spec, Tally
from saltern.pipeline.runs.reader import read_columns
from saltern.pipeline.show.grid import png, publish_grid
from saltern.pipeline.storage.store import Store
from saltern.pipeline.synthesis.ascend import Peak, ascend, start
from saltern.schemas.choices import FirstImage, check_choice
from saltern.schemas.config import Ascent, VisualizeConfig
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import Receipt
from saltern.schemas.run import CLASSES, Run, Shard, classes_of
from saltern.schemas.saliency import NONFINITE, OK
from saltern.schemas.sizes import Side

BATCH_SIZE = {"cpu": 8, "cuda": 64}  # classes
SHOWN = 64  # images of the contact sheet


@dataclass(frozen=True)
class VisualizeRequest:
    """Options of `visualize-class`. None = the existing run's value, or the default."""

    classes: str  # numbers and ranges, @file or all
    model: str
    weights: str = "DEFAULT"
    crop: Side | None = None
    ascent: Ascent = Ascent(steps=200, step_size=1.0, weight=1e-3, init="zero")  # noqa: RUF009 - frozen
    seed: int = 0
    batch_size: int | None = None
    torch_threads: int | None = None
    deterministic: bool | None = None


def visualizing(request: VisualizeRequest) -> Job:
    """Return the job of `saltern visualize-class`."""
    return Job(partial(plan, request), Visualizer, close)


def plan(request: VisualizeRequest, existing: Run | None, device: str, workers: int) -> tuple[Run, list[str]]:
    """Return the requested run, as extract.request.resolve does. Raises UserError if an option is invalid."""
    how = request.ascent
    check_choice("--init", how.init, FirstImage)
    if how.steps < 1 or how.step_size <= 0 or how.weight < 0:
        raise UserError("--steps must be at least 1, --step-size larger than 0, --lambda at least 0")
    classifier = load_classifier(request.model, request.weights, request.seed, request.crop)
    targets = parse_classes(request.classes, classifier.classes)
    usual = classifier.preset.preprocess
    chosen = adapt(classifier.preset, crop=request.crop, squash=True if request.crop else None)  # no image is cropped
    config = VisualizeConfig(
        **model_fields(classifier, request.model, request.weights, request.seed),
        **pin(request, existing, device, workers, BATCH_SIZE),
        preprocess=replace(chosen, squash=usual.squash),
        ascent=how,
    )
    if not is_proven(config, existing):
        try_gradient(classifier.model, config.preprocess.crop)
    size = config.batch_size
    shards = [_shard(number, targets[at : at + size]) for number, at in enumerate(range(0, len(targets), size))]
    return new_run(config, shards, classifier.class_names), []


def parse_classes(text: str, classes: int) -> list[int]:
    """Parse `243,281`, `0-9`, `@file` or `all` into class numbers, ascending and each once. Raises UserError."""
    if text == "all":
        return list(range(classes))
    words = text
    if text.startswith("@"):
        try:
            words = Path(text[1:]).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {text}: {error}") from error
    numbers: set[int] = set()
    for word in re.split(r"[,\s]+", words.strip(", \n\t")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--classes {text}: {word!r} is no class; give numbers and ranges, as 243,281,0-9, or all")
        if last >= classes:
            raise UserError(f"--classes {text}: {last} is out of range: the model has classes 0..{classes - 1}")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def _shard(number: int, targets: list[int]) -> Shard:
    return Shard(f"classes-{number:06}", CLASSES + ",".join(map(str, targets)), len(targets))


class Visualizer:
    """A processor of batches of classes with one loaded classifier. `process` may run in two threads at once.

    Raises:
        UserError: the model or its weights are not available here, or the weights are not the run's.
    """

    def __init__(self, spec: Spec):
        self._run, self._config = spec.run, spec.run.config_of(VisualizeConfig)
        self.images: dict[str, int] = {}  # a batch of classes ends at once, so none is ever in process
        self._outlet = Outlet(spec)
        self._device = torch.device(spec.device)
        # torch keeps a thread count for each calling thread: set it in the one that computes.
        threads = self._config.torch_threads
        self._compute = ThreadPoolExecutor(1, "saltern-device", lambda: torch.set_num_threads(threads))
        self._model = self._compute.submit(self._load).result()
        self._schema = data_schema(spec.run, {})

    def process(self, shard: Shard, earlier: Receipt | None = None) -> Made:
        """Visualize one batch of classes into the scratch folder, whatever its earlier receipt.

        Raises:
            MemoryError: the batch does not fit in the device's memory.
            OutputError: the run's folder accepts no more data.
            DeviceLostError: this process cannot be used any more.
        """
        tally = Tally()
        with self._outlet.open(self._schema, tally) as writer:
            peak, seconds = self._compute.submit(self._ascend, classes_of(shard)).result()
            tally.seconds["compute"] += seconds
            with self._outlet.writing(tally):
                records = self._records(shard, peak)
                rows = from_records(records, self._schema)
                writer.write(rows)
            pictures = {
                picture_name(record["target"], self._run.class_names): self._outlet.add(record["image"], tally)
                for record in records
                if "image" in record
            }
            tally.count(len(records), rows)
            made = self._outlet.close(shard, writer, tally, self._config.batch_size, pictures)
        return made

    def close(self) -> None:
        """Release the thread, the model and its device memory. No batch is in process."""
        self._compute.shutdown()
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self) -> nn.Module:
        with self._arithmetic(), faults():
            return load_model(self._config, self._device)

    def _arithmetic(self) -> AbstractContextManager[None]:
        config = self._config
        fix = "give --no-deterministic"
        what = f"the ascent of {config.model}"
        return arithmetic(config.precision, deterministic=config.deterministic, what=what, fix=fix)

    def _ascend(self, targets: list[int]) -> tuple[Peak, float]:
        since = time.perf_counter()
        target_B, config = torch.tensor(targets), self._config
        shape = (3, *config.preprocess.shape)
        first_BCHW = start(target_B, shape, config.ascent.init, config.seed)

        def logits(image_BCHW: Tensor) -> Tensor:
            return logits_of(self._model(image_BCHW))

        try:
            with self._arithmetic(), faults(), torch.enable_grad(), frozen(self._model):
                peak = ascend(logits, first_BCHW.to(self._device), target_B.to(self._device), config.ascent)
                return peak.to_host(), time.perf_counter() - since
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(f"{len(targets)} classes do not fit in memory: give a smaller --batch-size") from error

    def _records(self, shard: Shard, peak: Peak) -> list[Record]:
        how = self._config.preprocess
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
        levels_BCHW = ((peak.image_BCHW * std + mean).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        pixels_BHWC = levels_BCHW.permute(0, 2, 3, 1).numpy()
        names = self._run.class_names
        records = []
        for index, target in enumerate(classes_of(shard)):
            curve = peak.objective_BT[index].tolist()
            finite = bool(np.isfinite(curve).all())
            record: Record = {
                "key": str(target),
                "shard": shard.name,
                "index": index,
                "target": target,
                "class_name": names[target] if names else None,
                "objective": curve,
                "status": OK if finite else NONFINITE,
                "error": None if finite else "the ascent left the finite numbers: give a smaller --step-size",
            }
            if finite:
                record |= {
                    "logit": peak.logit_B[index].item(),
                    "score": peak.probability_B[index].item(),
                    "objective_start": curve[0],
                    "objective_end": curve[-1],
                    "image": png(pixels_BHWC[index]),
                }
            records.append(record)
        return records


def close(store: Store, run: Run) -> None:
    """Print a summary, and publish a contact sheet of the first classes."""
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
    publish_grid(store, "pictures.png", cells, columns=min(8, len(cells)))
