"""saltern sanity: test whether a run's maps depend on what they are said to explain."""

from typing import Annotated

import typer

from saltern.jobs import options as opt
from saltern.schemas import choices


def sanity(
    run: opt.RunFolder,
    more: opt.MoreShards = None,
    shards: Annotated[
        list[str] | None, opt.inputs("Where its shards are now, if they were moved.", metavar="SHARDS...")
    ] = None,
    images: Annotated[int, opt.inputs("Use the first N images that have a map.", min=1)] = 16,
    stages: Annotated[
        int,
        opt.model("Steps in which the layers become random; 1: all at once, which is quick over many images.", min=1),
    ] = 12,
    device: opt.Device = choices.Device.auto,
    batch_size: Annotated[int, opt.execution("Images of a pass.", min=1)] = 16,
    as_json: opt.AsJson = False,
) -> None:
    """Randomise the model's layers from the logits down, and compare the maps with those of the trained model.

    Prints a verdict with its rule; a method whose maps stay does not explain the model. Keeps the figures in
    RUN/metrics/sanity.json and a plot in RUN/metrics/sanity.png. For a run of attack, compares its maps with the pixels
    that the attack without a map changed most. The exit code is 0 whatever the verdict.
    """
    import json

    from saltern.pipeline.metrics.sanity.run import sanity as judge

    # If the shell expands a glob, `--shards` takes the first path and the others come as arguments.
    patterns = [*(shards or []), *(more or [])]
    found = judge(run, images, stages=stages, patterns=patterns, device=device.value, batch_size=batch_size)
    if as_json:
        typer.echo(json.dumps(found.summary, indent=1))
        return
    for line in found.lines:
        opt.say(line)
    if "rule" in found.summary:
        opt.say(found.summary["rule"])
