"""Extract and judge a run for each method and layer."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest, load_classifier
from saltern.pipeline.extract.several import each_method
from saltern.pipeline.layerwise.report import Comparison, Line, write_report
from saltern.pipeline.methods import find
from saltern.pipeline.metrics.evaluate import EvaluateRequest, StoppedError, evaluate
from saltern.pipeline.metrics.families import choose_metrics
from saltern.pipeline.models.layers import resolve
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class LayersRequest:
    """Options of `layers`."""

    extract: ExtractRequest  # its method may name several, with commas; its layer is not used
    layers: Sequence[str]  # dotted names, from the image to the logits
    metrics: Sequence[str]  # as of EvaluateRequest


def compare_layers(request: LayersRequest, options: RunOptions) -> Comparison:
    """Compare methods at several layers (Relevance-CAM's study by layer, Lee 2021).

    Writes a run OUT/LAYER/METHOD for each, resumes what is there, and writes layers.json, layers.md and layers.png in
    OUT. The methods of a layer read and decode each shard once.

    Args:
        request: the methods, layers and metrics.
        options: of the execution.

    Raises:
        UserError: a method, layer or metric is unknown, or a method has no target layer; nothing was started. Or as
            `evaluate`.
        StoppedError: an extraction or evaluation ended before all shards were done; the same command goes on.
    """
    choose_metrics(request.metrics)
    methods = list(each_method(replace(request.extract, layer=None)))
    for method in methods:
        if not find(method).layered:
            raise UserError(f"--method {method} has no target layer, so it is the same at all of them; leave it out")
    wanted = request.extract
    model = load_classifier(wanted.model, wanted.weights, wanted.seed, wanted.crop).model
    layers = resolve(model, request.layers, wanted.crop)
    root = options.out.rstrip("/")
    for layer in layers:
        _extract(replace(wanted, layer=layer), replace(options, out=_folder(root, layer, methods)))
    lines = [Line(method, layer, f"{root}/{layer}/{method}") for method in methods for layer in layers]
    how = {name: getattr(wanted, name) for name in ("precision", "batch_size", "torch_threads", "deterministic")}
    found = evaluate(EvaluateRequest([line.run for line in lines], metrics=request.metrics, **how), options)
    comparison = Comparison(wanted.model, layers, methods, lines, found)
    write_report(comparison, Store(root))
    return comparison


def _folder(root: str, layer: str, methods: Sequence[str]) -> str:
    """Return the folder for a layer's extraction, which puts several methods into one folder each."""
    return f"{root}/{layer}" if len(methods) > 1 else f"{root}/{layer}/{methods[0]}"


def _extract(request: ExtractRequest, options: RunOptions) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # only the table goes to stdout
        result = conduct(extraction(request), options)
    # Code 1 without failures: few rows are ok, as at a layer where a method gives zeros.
    if result.code not in (0, 1) or result.failures or result.done < result.shards:
        raise StoppedError(result)
