"""saltern export: write a run in the formats of other tools."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect, leave
from saltern.schemas import choices


def export(
    ctx: typer.Context,
    run: opt.RunFolder,
    more: opt.MoreShards = None,
    *,
    form: Annotated[
        choices.ExportFormat,
        opt.output(
            "wds: tars that go with the shards; npy: arrays of each shard; png: grey pictures; coco: one JSON file; "
            "labelstudio: tasks with predictions.",
            "--format",
            show_default=False,
        ),
    ],
    out: opt.Out,
    shards: Annotated[
        list[str] | None,
        opt.inputs("Shards of the run to export; default: all, from where it read them.", metavar="SHARDS..."),
    ] = None,
    engine: opt.Engine = choices.Engine.auto,
    address: opt.Address = None,
    workers: opt.Workers = None,
    shard_timeout_s: opt.ShardTimeout = None,
    max_failed_shards: opt.MaxFailedShards = None,
) -> None:
    """Write maps, masks and boxes of a run in the format of another tool.

    DIR must be new, empty, or hold an export of the same run in the same format: a repeated command writes only what is
    missing. The exit code is 1 if shards could not be read.
    """
    from saltern.pipeline.engine.conduct import RunOptions
    from saltern.pipeline.engine.derived import StoppedError
    from saltern.pipeline.export.export import export as write
    from saltern.schemas.text import counted

    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    try:
        exported = write(run, form, out, [*(shards or []), *(more or [])], collect(RunOptions, ctx))
    except StoppedError as stopped:
        leave(stopped.result)
    for line in exported.hints:
        opt.say(line, err=True)
    opt.say(f"{counted(exported.rows, 'row')} of {counted(exported.shards, 'shard')} as {form.value} in {out}")
    for shard, reason in exported.failures.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if exported.failures else 0)
