"""saltern evaluate: compare a run with the true boxes of its samples."""

from typing import Annotated

import typer

from saltern.jobs import options as opt


def evaluate(
    run: opt.RunFolder,
    more: opt.MoreShards = None,
    shards: Annotated[
        list[str] | None,
        opt.inputs("Shards of the run to use; default: all, from where it read them.", metavar="SHARDS..."),
    ] = None,
    metric: Annotated[list[str] | None, opt.output("Metrics to compute; default: all.", metavar="le,om,f1")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure localization by the boxes in the samples' json: LE, OM and continuous F1.

    Compares with a centre box and the whole image, and keeps the numbers in RUN/metrics. The exit code is 1 if shards
    could not be read.
    """
    import json

    from saltern.pipeline.metrics.evaluate import evaluate as measure
    from saltern.pipeline.metrics.table import as_table, remarks

    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    evaluation = measure(run, [*(shards or []), *(more or [])], metric or [])
    for line in evaluation.notes:
        opt.say(line, err=True)
    if as_json:
        typer.echo(json.dumps(evaluation.summary(), indent=1))
    else:
        typer.echo(as_table(evaluation))
        for line in remarks(evaluation):
            opt.say(line)
    for shard, reason in evaluation.unread.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if evaluation.unread else 0)
