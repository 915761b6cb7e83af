"""saltern visualize-class: make the image that maximises each class's logit."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, drive
from saltern.schemas import choices


def visualize_class(
    ctx: typer.Context,
    *,
    model: opt.Model,
    classes: Annotated[
        str, opt.inputs("Classes as numbers and ranges (243,281,0-9), @FILE of them, or all.", show_default=False)
    ],
    weights: opt.Weights = "DEFAULT",
    deterministic: opt.Deterministic = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = 200,
    step_size: Annotated[float, opt.steps("Factor on the gradient in one step.")] = 1.0,
    weight: Annotated[float, opt.steps("Weight of the image's squared norm.", "--lambda", min=0)] = 1e-3,
    init: Annotated[
        choices.FirstImage, opt.steps("Image to start from: zero, or noise drawn for each class.")
    ] = choices.FirstImage.zero,
    crop: opt.Crop = None,
    out: opt.Out,
    overwrite: opt.Overwrite = False,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    device: opt.Device = choices.Device.auto,
    batch_size: Annotated[
        int | None, opt.execution("Classes in a batch; default: 8 on a CPU, 64 on a GPU.", min=1)
    ] = None,
    shard_timeout_s: opt.ShardTimeout = None,
    max_failed_shards: opt.MaxFailedShards = None,
) -> None:
    """Make the image that maximises each class's logit, by ascent of logit - lambda * ||I||^2 on the normalised image.

    Writes DIR/pictures/CLASS-NAME.png, DIR/pictures.png with all of them, and Parquet files with the objective at every
    step. To resume a run, repeat the command.
    """
    from saltern.pipeline.synthesis.visualize import VisualizeRequest, visualizing
    from saltern.schemas.config import Ascent

    drive(ctx, visualizing(collect(VisualizeRequest, ctx, ascent=collect(Ascent, ctx))))
