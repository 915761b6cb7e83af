"""saltern evaluate: measure runs, each against the controls."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, leave
from saltern.schemas import choices


def evaluate(
    ctx: typer.Context,
    runs: opt.RunFolders,
    *,
    shards: Annotated[
        list[str] | None,
        opt.inputs("Shards of the runs to use; default: all, from where they read them.", metavar="SHARDS..."),
    ] = None,
    metric: opt.Metrics = None,
    classifiers: Annotated[
        list[str] | None,
        opt.model(
            "Of the metrics masked-in, masked-out and inpainted: further classifiers, besides the run's own.",
            metavar="MODEL,MODEL=WEIGHTS,...",
        ),
    ] = None,
    multiply: Annotated[
        choices.Multiply,
        opt.model("Of average drop, increase, the densities and coherency: multiply the normalised image or pixels."),
    ] = choices.Multiply.normalised,
    format: Annotated[choices.TableFormat, opt.output("Form of the table.")] = choices.TableFormat.text,
    precision: opt.Precision = choices.Precision.fp32,
    deterministic: opt.Deterministic = None,
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
    """Measure runs: localization by the boxes in the samples' json, and other metrics; controls are in every table.

    The results are kept in RUN/metrics, and a repeated command computes only what is missing. The exit code is 1 if
    shards could not be read.
    """
    from saltern.pipeline.engine.conduct import RunOptions
    from saltern.pipeline.engine.derived import StoppedError
    from saltern.pipeline.metrics import table
    from saltern.pipeline.metrics.evaluate import EvaluateRequest, named
    from saltern.pipeline.metrics.evaluate import evaluate as measure

    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    folders, tars = named(runs, shards or [])
    further = [word.strip() for text in classifiers or [] for word in text.split(",")]
    request = collect(EvaluateRequest, ctx, runs=folders, shards=tars, metrics=metric or [], classifiers=further)
    try:
        evaluation = measure(request, collect(RunOptions, ctx, out=folders[0]))
    except StoppedError as stopped:
        leave(stopped.result)
    for line in table.notes(evaluation):
        opt.say(line, err=True)
    forms = {"markdown": table.as_markdown, "csv": table.as_csv, "json": table.as_json, "text": table.as_text}
    typer.echo(forms[format.value](evaluation))
    for line in table.remarks(evaluation):
        opt.say(line, err=format != choices.TableFormat.text)  # programs read the other forms from stdout
    for shard, reason in evaluation.unread.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if evaluation.unread else 0)
