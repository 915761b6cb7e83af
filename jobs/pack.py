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
        Path | None,
        opt.inputs(
            "Folder of ILSVRC annotations, CLASS/STEM.xml or STEM.xml, or a CSV file of boxes: image,x0,y0,x1,y1.",
            metavar="DIR|FILE",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        opt.inputs(
            "Number the class folders as in ImageNet (by WordNet id or name) or as in a file of names; default: from 0 "
            "by their order.",
            metavar="imagenet|FILE",
        ),
    ] = None,
    shuffle: Annotated[int, opt.output("Seed of the order of the samples.", metavar="SEED")] = 0,
    no_shuffle: Annotated[bool, opt.output("Keep the order of the paths, class by class.", "--no-shuffle")] = False,
) -> None:
    """Pack an image folder into shuffled tar shards, with classes and boxes.

    Image files are stored unchanged; classes.json names the classes. DIR must not hold shards yet.
    """
    import shlex

    from saltern.pipeline.shards.pack import pack as write
    from saltern.schemas.text import counted, in_bytes

    order = None if no_shuffle else shuffle
    packed = write(folder, out, per_shard=per_shard, boxes=boxes, classes=classes, shuffle=order)
    for remark in packed.remarks.lines():
        opt.say(remark, err=True)
    classes_found = counted(packed.classes, "class", "classes") if packed.classes else "unknown classes"
    line = f"{counted(packed.samples, 'image')} of {classes_found}, {in_bytes(packed.bytes)}"
    line += f", in {counted(packed.shards, 'shard')} in {out}"
    if boxes is not None:
        line += f"; {packed.samples - packed.unboxed:,} with boxes, {packed.unboxed:,} without an annotation"
    opt.say(line)
    fix = "" if classes else " --target top1"
    extract = f"saltern extract {shlex.quote(str(out))} --out RUN --model resnet50 --method grad-cam{fix}"
    opt.say(f"next: {extract}", err=True)
