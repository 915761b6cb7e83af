"""saltern plan: estimate the time and the output of a run."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect
from saltern.schemas import choices


def plan(
    ctx: typer.Context,
    shards: opt.Shards,
    *,
    model: opt.Model = "",
    method: opt.Methods = "grad-cam",
    weights: opt.Weights = "DEFAULT",
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    layer: opt.Layer = None,
    options: opt.Options = None,
    checkpoint: opt.Checkpoint = None,
    target: opt.Target = "label",
    precision: opt.Precision = choices.Precision.fp32,
    image_member: opt.ImageMember = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    squash: opt.Squash = None,
    map_size: opt.MapSize = choices.MapSize.native,
    map_dtype: opt.MapDtype = None,
    no_map: opt.NoMap = False,
    as_json: opt.AsJson = False,
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
    workers: Annotated[int, opt.execution("Number of workers like this machine to plan for.", min=1)] = 1,
) -> None:
    """Count shards and samples, and estimate hours and bytes by extracting a few dozen images.

    Several methods are measured together, as `extract` makes them. Without --model, only counts. Starts no run.
    """
    import json
    from dataclasses import asdict

    from saltern.pipeline.extract.estimate import estimate
    from saltern.pipeline.extract.request import ExtractRequest

    given = opt.with_checkpoint(ctx.params["options"], checkpoint)
    target = "top1" if target == "label" else target  # costs the same, and needs no labels
    request = collect(ExtractRequest, ctx, options=given, target=target, save_map=not no_map)
    made, hints = estimate(request, device.value, workers)
    for line in hints:
        opt.say(line, err=True)
    typer.echo(json.dumps(asdict(made), indent=1) if as_json else made.table())
