"""saltern pack: make shards from an image folder."""

from pathlib import Path
from typing import Annotated

import typer

from saltern.jobs import options as opt


def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of images: one sub-folder for each class, or none.")],
    *,
    out: opt.OutFolder,
    per_shard: Annotated[int, opt.output("Samples in a shard.", min=1)] = 1000,
    boxes: Annotated[
        Path | None, opt.inputs("Folder of ILSVRC annotations: CLASS/STEM.xml or STEM.xml.", metavar="DIR")
    ] = None,
) -> None:
    """Pack an image folder into tar shards, with classes and boxes.

    Image files are stored unchanged, in the order of their paths. DIR must not hold shards yet.
    """
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
