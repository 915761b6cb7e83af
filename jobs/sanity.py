"""saltern sanity: test whether a run's maps depend on what they are said to explain."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, leave
from saltern.schemas import choices


def sanity(
    ctx: typer.Context,
    run: opt.RunFolder,
    more: opt.MoreShards = None,
    *,
    shards: Annotated[
        list[str] | None,
        opt.inputs("Shards of the run to use; default: all, from where it read them.", metavar="SHARDS..."),
    ] = None,
    images: Annotated[int, opt.inputs("Use the first N images that have a map.", min=1)] = 16,
    stages: Annotated[
        int,
        opt.model("Steps in which the layers become random; 1: all at once, which is quick over many images.", min=1),
    ] = 12,
    deterministic: opt.Deterministic = None,
    as_json: opt.AsJson = False,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
    decode_threads: opt.DecodeThreads = None,
    shard_timeout_s: opt.ShardTimeout = None,
    max_failed_shards: opt.MaxFailedShards = None,
) -> None:
    """Randomise the model's layers from the logits down, and compare the maps with those of the trained model.

    Prints a verdict with its rule; a method whose maps stay does not explain the model. Keeps a row for each image in
    RUN/metrics/sanity, the figures in RUN/metrics/sanity.json and a plot in RUN/metrics/sanity.png; a repeated command
    computes only what is missing. For a run of attack, compares its maps with the pixels that the attack without a map
    changed most. The exit code is 0 whatever the verdict, and 1 if shards could not be read.
    """
    import json

    from saltern.pipeline.engine.conduct import RunOptions
    from saltern.pipeline.engine.derived import StoppedError
    from saltern.pipeline.metrics.sanity.run import SanityRequest
    from saltern.pipeline.metrics.sanity.run import sanity as judge

    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    request = collect(SanityRequest, ctx, shards=[*(shards or []), *(more or [])])
    try:
        found = judge(request, collect(RunOptions, ctx, out=run))
    except StoppedError as stopped:
        leave(stopped.result)
    if as_json:
        typer.echo(json.dumps(found.summary, indent=1))
    else:
        for line in (*found.lines, *([found.summary["rule"]] if "rule" in found.summary else [])):
            opt.say(line)
    for shard, reason in found.unread.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if found.unread else 0)
