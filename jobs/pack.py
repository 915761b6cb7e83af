"""saltern pack: an image folder becomes shards."""

from pathlib import Path
from typing import Annotated

import typer


def pack(
    folder: Annotated[Path, typer.Argument(help="Images: one sub-folder a class, or flat.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; none may stand in it yet.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    boxes: Annotated[
        Path | None, typer.Option(help="Folder of ILSVRC annotations: CLASS/STEM.xml or STEM.xml.")
    ] = None,
) -> None:
    """Pack an image folder into tar shards, in the order of the paths: the files as they are, with class and boxes."""
    import shlex

    from saltern.pipeline.shards.pack import pack as write

    packed = write(folder, out, per_shard=per_shard, boxes=boxes)
    line = f"{packed.samples:,} images of {packed.classes or 'unknown'} classes, {packed.bytes / 1e6:,.1f} MB"
    line += f", in {packed.shards} shards in {out}"
    if packed.skipped:
        line += f"; {packed.skipped:,} other files skipped"
    if boxes is not None:
        line += f"; {packed.samples - packed.unboxed:,} with boxes, {packed.unboxed:,} without an annotation"
    typer.echo(line)
    fix = "" if packed.classes else " --target top1"
    extract = f"saltern extract {shlex.quote(str(out))} --out RUN --model resnet50 --method grad-cam{fix}"
    typer.echo(f"next: {extract}", err=True)
