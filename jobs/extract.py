"""saltern extract: make a saliency dataset from shards."""

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, drive
from saltern.schemas import choices


def extract(
    ctx: typer.Context,
    shards: opt.Shards,
    *,
    model: opt.Model,
    method: opt.Methods,
    weights: opt.Weights = "DEFAULT",
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    layer: opt.Layer = None,
    options: opt.Options = None,
    checkpoint: opt.Checkpoint = None,
    target: opt.Target = "label",
    labels: opt.Labels = "auto",
    precision: opt.Precision = choices.Precision.fp32,
    deterministic: opt.Deterministic = None,
    compile: opt.Compile = choices.Compile.auto,
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
    discretize: opt.Discretize = None,
    map_size: opt.MapSize = choices.MapSize.native,
    map_dtype: opt.MapDtype = None,
    no_map: opt.NoMap = False,
    overwrite: opt.Overwrite = False,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
    decode: opt.Decode = choices.Decode.auto,
    decode_threads: opt.DecodeThreads = None,
    retry_failed: opt.RetryFailed = False,
    shard_timeout_s: opt.ShardTimeout = None,
    max_failed_shards: opt.MaxFailedShards = None,
    config: opt.Config = None,
) -> None:
    """Extract saliency maps, masks and boxes. To resume a run, repeat the command."""
    from saltern.pipeline.extract.extraction import extraction
    from saltern.pipeline.extract.request import ExtractRequest

    given = opt.with_checkpoint(ctx.params["options"], checkpoint)
    drive(ctx, extraction(collect(ExtractRequest, ctx, options=given, save_map=not no_map)))
