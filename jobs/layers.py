"""saltern layers: compare methods at several layers of one model."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, leave
from saltern.schemas import choices


def layers(
    ctx: typer.Context,
    shards: opt.Shards,
    *,
    model: opt.Model,
    method: opt.Methods,
    layers: Annotated[
        str, opt.model("Target layers by dotted name, from the image to the logits.", metavar="NAME,...")
    ],
    metric: opt.Metrics = None,
    out: opt.Out,
    weights: opt.Weights = "DEFAULT",
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    options: opt.Options = None,
    target: opt.Target = "label",
    labels: opt.Labels = "auto",
    limit: opt.Limit = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    squash: opt.Squash = None,
    discretize: opt.Discretize = None,
    precision: opt.Precision = choices.Precision.fp32,
    seed: opt.Seed = 0,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
) -> None:
    """Extract and judge a run DIR/LAYER/METHOD for each method and layer, with one table and a plot over the layers.

    A repeated command computes only what is missing. Writes layers.json, layers.md and layers.png in DIR. The exit
    code is 1 if shards could not be read; they count for no layer.
    """
    from saltern.pipeline.engine.conduct import RunOptions
    from saltern.pipeline.engine.derived import StoppedError
    from saltern.pipeline.extract.request import ExtractRequest
    from saltern.pipeline.layerwise.compare import LayersRequest, compare_layers
    from saltern.pipeline.layerwise.report import as_markdown
    from saltern.pipeline.metrics.table import remarks

    names = [name.strip() for name in layers.split(",")]
    request = LayersRequest(collect(ExtractRequest, ctx), names, metric or [])
    try:
        comparison = compare_layers(request, collect(RunOptions, ctx))
    except StoppedError as stopped:
        leave(stopped.result)
    typer.echo(as_markdown(comparison))
    for line in remarks(comparison.evaluation):
        opt.say(line)
    for shard, reason in comparison.evaluation.unread.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if comparison.evaluation.unread else 0)
