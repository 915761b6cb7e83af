"""saltern leaderboard: methods against metrics over the same shards."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, leave
from saltern.schemas import choices


def leaderboard(
    ctx: typer.Context,
    shards: opt.Shards,
    *,
    model: opt.Model,
    method: opt.Methods,
    run: Annotated[
        list[str] | None,
        opt.inputs("A further run over the same shards, as of casm; repeatable.", metavar="RUN"),
    ] = None,
    weights: opt.Weights = "DEFAULT",
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    layer: opt.Layer = None,
    options: opt.Options = None,
    target: opt.Target = "label",
    labels: opt.Labels = "auto",
    precision: opt.Precision = choices.Precision.fp32,
    deterministic: opt.Deterministic = None,
    seed: opt.Seed = 0,
    limit: opt.Limit = None,
    image_member: opt.ImageMember = None,
    label_member: opt.LabelMember = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    squash: opt.Squash = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    out: opt.Out,
    metric: opt.Metrics = None,
    discretize: opt.Discretize = None,
    shown: Annotated[int, opt.output("Images on the page.", min=1)] = 24,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
    decode: opt.Decode = choices.Decode.auto,
    decode_threads: opt.DecodeThreads = None,
    shard_timeout_s: opt.ShardTimeout = None,
    max_failed_shards: opt.MaxFailedShards = None,
    config: opt.Config = None,
) -> None:
    """Compare methods: extract the runs that are missing, judge all by the same metrics, and make one table and page.

    Writes DIR/METHOD/ for each method, and DIR/leaderboard.json, .md and .html. To go on, repeat the command. The exit
    code is 1 if shards could not be read; they count for no method.
    """
    from saltern.pipeline.engine.conduct import RunOptions
    from saltern.pipeline.engine.derived import StoppedError
    from saltern.pipeline.extract.request import ExtractRequest
    from saltern.pipeline.leaderboard.board import make_leaderboard
    from saltern.pipeline.metrics.evaluate import EvaluateRequest
    from saltern.pipeline.metrics.table import remarks

    request = collect(ExtractRequest, ctx)
    judging = collect(EvaluateRequest, ctx, runs=[], shards=[], metrics=metric or [])
    try:
        board = make_leaderboard(request, run or [], judging, collect(RunOptions, ctx), shown)
    except StoppedError as stopped:
        leave(stopped.result)
    typer.echo(board.markdown())
    for line in remarks(board.evaluation):
        opt.say(line)
    opt.say(f"{out}/leaderboard.html")
    for shard, reason in board.evaluation.unread.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if board.evaluation.unread else 0)
