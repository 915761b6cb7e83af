"""saltern export: write a run in the formats of other tools."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.schemas import choices


def export(
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
) -> None:
    """Write maps, masks and boxes of a run in the format of another tool.

    DIR must be new, empty, or hold an export of the same run in the same format, which is written again. The exit code
    is 1 if shards could not be read.
    """
    from saltern.pipeline.export.export import export as write
    from saltern.schemas.text import counted

    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    exported = write(run, form, out, [*(shards or []), *(more or [])])
    for line in exported.hints:
        opt.say(line, err=True)
    opt.say(f"{counted(exported.rows, 'row')} of {counted(exported.shards, 'shard')} as {form.value} in {out}")
    for shard, reason in exported.failures.items():
        opt.say(f"{shard}: {reason}", err=True)
    raise typer.Exit(1 if exported.failures else 0)
