"""saltern visualize-class: what a classifier sees in its classes."""

from functools import partial
from typing import Annotated

import typer

from saltern.jobs import options
from saltern.jobs.options import Model, Weights


def visualize_class(
    model: Model,
    classes: Annotated[str, typer.Option(help="Numbers and ranges, as 243,281,0-9; @FILE of them; or all.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder or URL for what is made.", show_default=False)],
    weights: Weights = "DEFAULT",
    steps: Annotated[int, typer.Option(min=1, help="Of plain gradient ascent.")] = 200,
    step_size: Annotated[float, typer.Option(help="What a step's gradient is multiplied by.")] = 1.0,
    weight: Annotated[float, typer.Option("--lambda", min=0, help="Weight of the squared norm.")] = 1e-3,
    init: Annotated[str, typer.Option(help="zero, or noise (drawn for each class by itself).")] = "zero",
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the images; default: the weights'.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Classes at a time; default 8 on a CPU, 64 on a GPU.")
    ] = None,
    engine: options.Engine = "auto",
    address: options.Address = None,
    workers: options.Workers = None,
    gpus_per_worker: options.GpusPerWorker = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    shard_timeout: options.ShardTimeout = None,
    max_failed_shards: options.MaxFailedShards = None,
    seed: Annotated[int, typer.Option(help="Of random weights and of the noise.")] = 0,
) -> None:
    """Make the image that each class's logit likes best: ascent of logit - lambda * ||I||^2 on the normalised image.
    Writes DIR/pictures/CLASS-NAME.png, DIR/pictures.png of all, and Parquet with the course of the objective. The same
    command again goes on where the last one ended.
    """
    from saltern.pipeline.engine.conduct import Job
    from saltern.pipeline.synthesis.visualize import Visualizer, VisualizeRequest, close, plan

    request = VisualizeRequest(
        classes=classes,
        model=model,
        weights=weights,
        crop=crop,
        steps=steps,
        step_size=step_size,
        weight=weight,
        init=init,
        seed=seed,
        pinned={"batch_size": batch_size},
    )
    options.drive(
        Job(partial(plan, request), Visualizer, close),
        out=out,
        engine=engine,
        address=address,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        device=device,
        overwrite=overwrite,
        shard_timeout_s=shard_timeout,
        max_failed_shards=max_failed_shards,
    )
