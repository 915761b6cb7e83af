"""saltern evaluate: a run against the true boxes of its samples."""

from typing import Annotated

import typer

from saltern.jobs.options import AsJson, RunFolder


def evaluate(
    run: RunFolder,
    more: Annotated[list[str] | None, typer.Argument(metavar="SHARDS...", hidden=True)] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARDS...", help="The run's shards, or some; default: where it read them."),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="le,om,f1", help="Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Localization numbers of a run: LE, OM and continuous F1 by the boxes in the samples' json, beside a centre box
    and the whole image. Also kept in RUN/metrics. Exit code 1 where shards could not be read.
    """
    import json

    from saltern.pipeline.metrics.evaluate import evaluate as judge
    from saltern.pipeline.metrics.table import as_table, remarks

    # A glob that the shell has expanded: `--shards` takes the first path, and the others come as arguments.
    found = judge(run, [*(shards or []), *(more or [])], metric or [])
    for line in found.notes:
        typer.echo(line, err=True)
    if as_json:
        typer.echo(json.dumps(found.summary(), indent=1))
    else:
        typer.echo(as_table(found))
        for line in remarks(found):
            typer.echo(line)
    for shard, reason in found.unread.items():
        typer.echo(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if found.unread else 0)
