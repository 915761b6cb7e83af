"""The job `extract`: makes maps, masks and boxes from images by a saliency method."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saltern.pipeline.engine.conduct import Job, RunOptions, RunResult, conduct
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.extract.task import Explained, Item, Pending, assemble
from saltern.pipeline.maps.discretize import largest_box
from saltern.pipeline.maps.encode import unpack_mask
from saltern.pipeline.maps.frame import to_original
from saltern.pipeline.masknet.checkpoint import mark_used
from saltern.pipeline.methods import Method, build
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.agreement import label_doubt
from saltern.pipeline.runs.datafile import data_schema
from saltern.pipeline.runs.manifest import read_receipts
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.runs.writer import Record
from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.decode import Decoded
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import ExtractConfig, MethodConfig, RunConfig, check_keys
from saltern.schemas.errors import UserError, printable
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import MISSING_LABEL, NONFINITE, OK, ZERO_MAP

REASONS = {
    ZERO_MAP: "the method gave zeros everywhere",
    NONFINITE: "the map is not finite, or does not fit the stored dtype; use --precision fp32 and --map-dtype float32",
}


def extract(
    shards: str | os.PathLike[str] | Sequence[str], out: str | os.PathLike[str], *, model: str, method: str, **more: Any
) -> RunResult:
    """Extract maps, masks and boxes, or resume an extraction, as `saltern extract` does.

    Args:
        shards: a tar, a glob, a folder or a URL, or several of them.
        out: folder or URL of the run.
        model, method: by name, as on the command line.
        more: any other field of ExtractRequest or RunOptions, as target="top1", options={"size": 7}, workers=2.

    Returns:
        How the run ended. Shards that failed are in its `failures`.

    Raises:
        UserError: an option is unknown or invalid, or the folder has another run. Nothing was started.
        KeyboardInterrupt: interrupted. Finished shards are kept, and the same call resumes the run.
    """
    shards = [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else list(shards)
    given = {"shards": shards, "out": os.fspath(out), "model": model, "method": method, **more}
    request_keys, run_keys = ([item.name for item in fields(kind)] for kind in (ExtractRequest, RunOptions))
    check_keys(given, [*request_keys, *run_keys], "the options of extract")
    request = ExtractRequest(**{key: value for key, value in given.items() if key in request_keys})
    result = conduct(extraction(request), RunOptions(**{key: given[key] for key in run_keys if key in given}))
    if result.code == 130:
        raise KeyboardInterrupt
    return result


def extraction(request: ExtractRequest) -> Job:
    """Return the job of `saltern extract`."""
    return Job(partial(resolve, request), partial(Processor, task=Extraction), _doubt_labels)


def _doubt_labels(store: Store, run: Run) -> None:
    """Warn if the labels do not seem to be the model's class numbers."""
    doubt = label_doubt(store, run, read_receipts(store, run))
    if doubt:
        print(f"WARNING: {doubt}", file=sys.stderr)


class Extraction:
    """The task of `extract`: explains each image and makes its rows."""

    def __init__(self, spec: Spec, device: torch.device):
        config = self._config = spec.run.config_of(ExtractConfig)
        if config.checkpoint is not None:
            mark_used(Path(config.checkpoint))
        self._explain = Explainer.of_run(config, load_method(config, device)[1], device)
        crop = config.preprocess.crop
        stored = self._explain_grey(crop)
        shape = None if stored is None else (int(stored.shape[1]), int(stored.shape[2]))
        measured = {"map_shape": shape, "map_clip_quantile": self._explain.clip_quantile}
        self.schema = data_schema(spec.run, measured)
        self._storage = Storage(shape, config.map_dtype == "uint8", (crop, crop))

    def _explain_grey(self, crop: int) -> NDArray[Any] | None:
        """Return the stored map of a grey image, which has the grid of all maps; None if maps are not stored."""
        grey_BHWC = torch.full((1, crop, crop, 3), 127, dtype=torch.uint8)
        return self._explain(grey_BHWC, torch.zeros(1, dtype=torch.long)).wait()[0].columns.get("map")

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        return self._explain(pixels_BHWC, label_B, seed_B)

    def problem(self, sample: Sample) -> tuple[str, str] | None:
        if self._config.target.kind != "label" or not self._explain.method.needs_target:
            return None
        if sample.label is None:
            unmapped = f"class {sample.given} is not in the table of --labels"
            return MISSING_LABEL, _no_label(sample) if sample.given is None else unmapped
        last = self._config.classes - 1
        if not 0 <= sample.label <= last:
            return MISSING_LABEL, f"label {sample.label} lies outside the model's classes 0..{last}"
        return None

    def records(self, shard: Shard, batch: list[Item], explained: Explained | None) -> list[Record]:
        return assemble(shard, batch, explained, self._storage.describe, REASONS, self._explain.rows_each)

    def close(self) -> None:
        self._explain.method.close()


def _no_label(sample: Sample) -> str:
    ext, _, key = (sample.named.label or "cls").partition(":")
    numbers = [name for name, value in extra(sample).items() if isinstance(value, int) and len(name) < 40]
    other = f"json:{printable(numbers[0])}" if numbers and not key else "EXT, such as txt, or json:KEY"
    what = f"`{key}` in its json" if key else f"`{ext}`"
    return (
        f"the target is the label, and the sample has no {what} that is a number; name it with --label-member {other}"
    )


@dataclass(frozen=True)
class Storage:
    """The form in which a run stores its maps and masks."""

    map_shape: tuple[int, int] | None  # cells; None if maps are not stored
    scaled: bool  # uint8: lo and hi belong to the map
    input_shape: tuple[int, int]  # pixels

    def describe(self, decoded: Decoded, columns: dict[str, NDArray[Any]], row: int, status: str) -> Record:
        """Return the columns of one explained row, except those that every job has."""
        target = int(columns["target"][row])
        record: Record = {"predicted": int(columns["predicted"][row])}
        if target >= 0:
            record |= {"target": target, "score": float(columns["score"][row])}
        if status == NONFINITE:
            return record
        if self.map_shape is not None:
            height, width = self.map_shape
            record |= {"map": columns["map"][row].tobytes(), "map_height": height, "map_width": width}
            if self.scaled:
                record |= {"map_lo": float(columns["map_lo"][row]), "map_hi": float(columns["map_hi"][row])}
        raw = columns["mask"][row].tobytes()
        box = largest_box(unpack_mask(raw, self.input_shape))
        boxes = [] if box is None else [to_original(box, decoded.geometry, decoded.image_height, decoded.image_width)]
        record |= {"mask": raw, "mask_area": float(columns["mask_area"][row]), "boxes": boxes}
        if status == OK:
            record["mask_threshold"] = float(columns["mask_threshold"][row])
        return record


def load_method(config: MethodConfig, device: torch.device) -> tuple[nn.Module, Method]:
    """Load the run's model, and build its method on it."""
    model = load_model(config, device)
    return model, build(
        config.method,
        model,
        layer=next(iter(config.layer), None),
        input_side=config.preprocess.crop,
        **config.method_options,
    )


def load_model(config: RunConfig, device: torch.device) -> nn.Module:
    """Load the run's model onto the device. Raises UserError if the weights here are not the run's."""
    classifier = classifiers.load(config.model, config.weights, seed=config.seed, side=config.preprocess.crop)
    if classifier.digest != config.weights_digest:
        raise UserError(
            f"the weights of {config.model} on {socket.gethostname()} are not the run's "
            f"(digest {classifier.digest[:12]}, the run has {config.weights_digest[:12]}): "
            "give the same file everywhere with --weights, or seed your factory"
        )
    model = classifier.model.to(device)
    return model if config.precision == "fp32" else model.to(memory_format=torch.channels_last)
