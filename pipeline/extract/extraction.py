"""The job `extract`: makes maps, masks and boxes from images by a saliency method."""

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saltern.pipeline.device import memory_format
from saltern.pipeline.engine.conduct import Job, Jobs, RunOptions, RunResult, conduct
from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.extract.explain import AUTOCAST, Explainer, explain_together
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.extract.rows import Rows
from saltern.pipeline.extract.several import each_method, resolve_each
from saltern.pipeline.extract.task import STATUSES, Explained, Pending, Task
from saltern.pipeline.maps.boxes import largest_boxes
from saltern.pipeline.maps.encode import packed_rows
from saltern.pipeline.maps.frame import to_original
from saltern.pipeline.masknet.checkpoint import mark_used
from saltern.pipeline.methods import Method, available, build, find
from saltern.pipeline.methods.cams.one_pass import OnePass, SharedPass
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.agreement import label_doubt
from saltern.pipeline.runs.columns import binary, box_lists, numbers
from saltern.pipeline.runs.datafile import data_schema
from saltern.pipeline.runs.manifest import read_receipts
from saltern.pipeline.runs.outlet import Spec
from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import ExtractConfig, MethodConfig, RunConfig, check_keys
from saltern.schemas.errors import UserError, printable
from saltern.schemas.run import Run, Shard
from saltern.schemas.saliency import MISSING_LABEL, NONFINITE, OK, ZERO_MAP

_SHOWN = 40  # characters of a label in a message
REASONS = {
    ZERO_MAP: "the method gave zeros everywhere",
    NONFINITE: "the map is not finite, or does not fit the stored dtype; use --precision fp32 and --map-dtype float32",
}


def extract(
    shards: str | os.PathLike[str] | Sequence[str],
    out: str | os.PathLike[str],
    *,
    model: str,
    method: str | Sequence[str],
    **more: Any,
) -> RunResult:
    """Extract maps, masks and boxes, or resume an extraction, as `saltern extract` does.

    Args:
        shards: a tar, a glob, a folder or a URL, or several of them.
        out: folder or URL of the run.
        model, method: by name, as on the command line. Of several methods, each has its run in `out/<method>`.
        more: any other field of ExtractRequest or RunOptions, as target="top1", options={"size": 7}, workers=2.

    Returns:
        How the run ended. Shards that failed are in its `failures`, the results of several methods in its `runs`.

    Raises:
        UserError: an option is unknown or invalid, or the folder has another run. Nothing was started.
        KeyboardInterrupt: interrupted. Finished shards are kept, and the same call resumes the run.
    """
    shards = [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else list(shards)
    name = method if isinstance(method, str) else ",".join(method)
    given = {"shards": shards, "out": os.fspath(out), "model": model, "method": name, **more}
    request_keys, run_keys = ([item.name for item in fields(kind)] for kind in (ExtractRequest, RunOptions))
    check_keys(given, [*request_keys, *run_keys], "the options of extract")
    request = ExtractRequest(**{key: value for key, value in given.items() if key in request_keys})
    result = conduct(extraction(request), RunOptions(**{key: given[key] for key in run_keys if key in given}))
    if result.code == 130:
        raise KeyboardInterrupt
    return result


def extraction(request: ExtractRequest) -> Job | Jobs:
    """Return the job of `saltern extract`, or the jobs of a request that names several methods.

    Raises:
        UserError: a method, or an option of one, is unknown.
    """
    requests = each_method(request)
    if "," in request.method:
        plan = partial(resolve_each, requests)
        return Jobs(list(requests), plan, partial(Processor, task=extractions), _doubt_labels)
    (only,) = requests.values()
    return Job(partial(resolve, only), partial(Processor, task=Extraction), _doubt_labels)


def _doubt_labels(store: Store, run: Run) -> None:
    """Warn if the labels do not seem to be the model's class numbers."""
    doubt = label_doubt(store, run, read_receipts(store, run))
    if doubt:
        print(f"WARNING: {doubt}", file=sys.stderr)


class Extraction(Task):
    """The task of `extract`: explains each image and makes its rows."""

    def __init__(self, spec: Spec, device: torch.device, explainer: Explainer | None = None):
        config = self._config = spec.run.config_of(ExtractConfig)
        if config.checkpoint is not None:
            mark_used(Path(config.checkpoint))
        self._explain = explainer or Explainer.of_run(config, load_method(config, device)[1], device)
        method = self._explain.method
        if isinstance(method, OnePass) and type(method) in available().values():  # another may compute as it likes
            self.team = (id(method.model), *method.layer)
        self._shared: dict[tuple[Method, ...], SharedPass] = {}  # by the methods of the tasks that share one
        input_shape = config.preprocess.shape
        stored = self._explain_grey(input_shape)
        shape = None if stored is None else (int(stored.shape[1]), int(stored.shape[2]))
        measured = {"map_shape": shape, "map_clip_quantile": self._explain.clip_quantile}
        self.schema = data_schema(spec.run, measured)
        self._rows = Storage(shape, config.map_dtype == "uint8", input_shape).rows(self.schema)

    def _explain_grey(self, input_shape: tuple[int, int]) -> NDArray[Any] | None:
        """Return the stored map of a grey image, which has the grid of all maps; None if maps are not stored."""
        grey_BHWC = torch.full((1, *input_shape, 3), 127, dtype=torch.uint8)
        return self._explain(grey_BHWC, torch.zeros(1, dtype=torch.long)).wait()[0].columns.get("map")

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        return self._explain(pixels_BHWC, label_B, seed_B)

    def together(self, others: Sequence["Extraction"], *inputs: Tensor) -> list[Pending]:
        explainers = [task._explain for task in (self, *others)]
        methods = tuple(explainer.method for explainer in explainers)
        if methods not in self._shared:
            self._shared[methods] = SharedPass([method for method in methods if isinstance(method, OnePass)])
        return explain_together(explainers, self._shared[methods].explain, *inputs)

    def problem(self, sample: Sample, label: int | None) -> tuple[str, str] | None:
        if self._config.target.kind != "label" or not self._explain.method.needs_target:
            return None
        if label is None:
            return MISSING_LABEL, _no_label(sample, self._config)
        return None if label < self._config.classes else (MISSING_LABEL, _outside(f"{label}", self._config.classes))

    def rows(self, shard: Shard, batch: Batch, explained: Explained | None) -> pa.RecordBatch:
        return self._rows(shard, batch, explained)

    def close(self) -> None:
        self._explain.method.close()


def extractions(specs: Mapping[str, Spec], device: torch.device) -> dict[str, Extraction]:
    """Return the tasks of several runs that differ in their methods only. Their methods share one model if they can."""
    configs = {name: spec.run.config_of(ExtractConfig) for name, spec in specs.items()}
    models: dict[object, nn.Module] = {}
    for config in configs.values():
        if _model_key(config) not in models:
            models[_model_key(config)] = load_model(config, device)
    # All are built before any casts or compiles the weights of its model.
    methods = {name: build_method(config, models[_model_key(config)]) for name, config in configs.items()}
    compiled: set[object] = set()
    tasks = {}
    for name, config in configs.items():
        key = _model_key(config)
        explainer = Explainer.of_run(config, methods[name], device, compiled=key in compiled)
        if config.compile:
            compiled.add(key)
        tasks[name] = Extraction(specs[name], device, explainer)
    return tasks


def _model_key(config: ExtractConfig) -> object:
    """Return a key that is equal for runs whose methods can have one model: they cast and compile the same parts."""
    kind = find(config.method)
    if kind not in available().values():
        return config.method
    if config.compile:
        return (kind.differentiates, *config.layer) if issubclass(kind, OnePass) else config.method
    own = kind.networks is not Method.networks or kind.passes is not Method.passes
    return config.method if own and config.precision in AUTOCAST else None


def _no_label(sample: Sample, config: ExtractConfig) -> str:
    """Return why a sample has no label."""
    text = printable(sample.class_text.decode("utf-8-sig", "replace").strip())
    if sample.given is not None and sample.numbers is not None:
        if config.prompts is not None:
            return (
                f"no prompt is known for class {sample.given}; name it in the classes.json of the shards, among "
                "--prompts or in the table of --labels"
            )
        return f"class {sample.given} is not in the table of --labels"
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return _outside(text, config.classes)
    ext, _, key = (sample.named.label or "cls").partition(":")
    numbers = [name for name, value in extra(sample).items() if isinstance(value, int) and len(name) < 40]
    other = f"json:{printable(numbers[0])}" if numbers and not key else "EXT, such as txt, or json:KEY"
    what = f"`{key}` in its json" if key else f"`{ext}`"
    if text:
        found = f"{what} is '{text[:_SHOWN]}', which is no whole number"
        return f"the target is the label, and {found}; write the class's number, or name it with --label-member {other}"
    return (
        f"the target is the label, and the sample has no {what} that is a number; name it with --label-member {other}"
    )


def _outside(label: str, classes: int) -> str:
    return f"label {label[:_SHOWN]} lies outside the model's classes 0..{classes - 1}"


@dataclass(frozen=True)
class Storage:
    """The form in which a run stores its maps and masks."""

    map_shape: tuple[int, int] | None  # cells; None if maps are not stored
    scaled: bool  # uint8: lo and hi belong to the map
    input_shape: tuple[int, int]  # pixels

    def rows(self, schema: pa.Schema) -> Rows:
        """Return the form of an extraction's rows."""
        return Rows(schema, partial(self._describe, schema), REASONS)

    def _describe(
        self, schema: pa.Schema, batch: Batch, slot_R: NDArray[np.intp], explained: Explained
    ) -> dict[str, pa.Array]:
        """Return the columns of explained rows, except those that every job has."""
        found, status_R = explained.columns, explained.status_R
        none_R, agnostic_R = status_R == STATUSES.index(NONFINITE), found["target"] < 0

        def column(name: str, null_R: NDArray[np.bool_] | None = None) -> pa.Array:
            return numbers(found[name], schema.field(name).type, null_R)

        columns = {"predicted": column("predicted")}
        columns |= {name: column(name, agnostic_R) for name in ("target", "score")}
        if self.map_shape is not None:
            columns["map"] = binary(found["map"], schema.field("map").type, none_R)
            for name, side in zip(("map_height", "map_width"), self.map_shape, strict=True):
                columns[name] = numbers(np.full(len(none_R), side), pa.int16(), none_R)
            if self.scaled:
                columns |= {name: column(name, none_R) for name in ("map_lo", "map_hi")}
        box_R4 = largest_boxes(packed_rows(found["mask"], self.input_shape))
        original_R4 = to_original(box_R4, batch.geometry_D4[slot_R], batch.size_D2[slot_R])
        return columns | {
            "mask": binary(found["mask"], pa.binary(), none_R),
            "mask_area": column("mask_area", none_R),
            "mask_threshold": column("mask_threshold", status_R != STATUSES.index(OK)),
            "boxes": box_lists(original_R4, box_R4[:, 2] == 0, none_R),
        }


def load_method(config: MethodConfig, device: torch.device) -> tuple[nn.Module, Method]:
    """Load the run's model, and build its method on it."""
    model = load_model(config, device)
    return model, build_method(config, model)


def build_method(config: MethodConfig, model: nn.Module) -> Method:
    """Return the run's method on a model, with its layer, options and target."""
    return build(
        config.method,
        model,
        layer=next(iter(config.layer), None),
        input_side=config.preprocess.crop,
        finer=config.target.finer if isinstance(config, ExtractConfig) else None,
        **config.method_options,
    )


def load_model(config: RunConfig, device: torch.device) -> nn.Module:
    """Load the run's model onto the device. Raises UserError if the weights here are not the run's."""
    classifier = classifiers.load(
        config.model, config.weights, seed=config.seed, side=config.preprocess.crop, prompts=config.prompts
    )
    if classifier.digest != config.weights_digest:
        raise UserError(
            f"the weights of {config.model} on {socket.gethostname()} are not the run's "
            f"(digest {classifier.digest[:12]}, the run has {config.weights_digest[:12]}): "
            "give the same file everywhere with --weights, or seed your factory"
        )
    model = classifier.model.to(device)
    layout = memory_format(config.precision, device)
    return model if layout == torch.contiguous_format else model.to(memory_format=layout)
