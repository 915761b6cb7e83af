"""Extract and judge a run for each method and layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.extract.request import ExtractRequest, find_inputs
from saltern.pipeline.extract.several import each_method
from saltern.pipeline.layerwise.report import Comparison, Line, write_report
from saltern.pipeline.leaderboard.board import extract_runs
from saltern.pipeline.methods import find
from saltern.pipeline.metrics.evaluate import EvaluateRequest, evaluate
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
    model = find_inputs(wanted, None).classifier.model
    layers = resolve(model, request.layers, wanted.crop)
    root = options.out.rstrip("/")
    runs = {layer: extract_runs(replace(wanted, layer=layer), options, f"{root}/{layer}") for layer in layers}
    lines = [Line(method, layer, runs[layer][at]) for at, method in enumerate(methods) for layer in layers]
    how = {name: getattr(wanted, name) for name in ("precision", "batch_size", "torch_threads", "deterministic")}
    found = evaluate(
        EvaluateRequest([line.run for line in lines], metrics=request.metrics, skip_failed=True, **how), options
    )
    comparison = Comparison(wanted.model, layers, methods, lines, found)
    write_report(comparison, Store(root))
    return comparison
