"""An image folder -> tar shards: the image files as they are, with class and boxes beside them."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from webdataset import TarWriter

from pipeline.expand import ENDINGS
from pipeline.shards import split_name
from pipeline.tape import IMAGES
from schemas.errors import UserError

SCRATCH = ".tmp-pack"
_MAX_XML = 2**20  # bytes


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    shards: int
    samples: int
    classes: int  # sub-folders, those without an image included; 0 for a flat folder
    bytes: int  # of the tars
    skipped: int  # files that are no images by their name
    unboxed: int  # images without an XML, where boxes were asked for


@dataclass(frozen=True, slots=True)
class _Image:
    path: str
    name: str  # relative to the folder
    key: str
    ext: str


def pack(folder: Path, out: Path, *, per_shard: int = 1000, boxes: Path | None = None) -> Packed:
    """Writes shards `shard-000000.tar`, ... in the order of the sorted paths. The same folder gives the same bytes.

    A sample's key is its path without the extension, further dots in the file's name being dashes, as a key ends at
    the first dot. Members: the image; `cls`, the index of its class among the sorted sub-folders, as torchvision's
    ImageFolder has it; `json` with `name`, the class's folder, and from the XML `boxes` [[x0, y0, x1, y1]], inclusive
    pixels, `height` and `width`.

    Args:
        folder: one sub-folder a class, or images alone.
        out: made where missing; no shard may stand in it. Shards appear there once all are written.
        per_shard: samples a shard.
        boxes: ILSVRC annotations: CLASS/STEM.xml or STEM.xml, in it or in its sub-folder Annotation.

    Raises:
        UserError: no image, images beside class folders, shards in `out`, a damaged XML, an unreadable file.
    """
    if per_shard < 1:
        raise UserError(f"--per-shard {per_shard}: at least one sample is needed")
    _check_folders(folder, out, boxes)
    scratch = out / SCRATCH
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        packed = _Packer(folder, boxes).write(scratch, per_shard)
        for path in sorted(scratch.iterdir()):
            path.rename(out / path.name)
        return packed
    except OSError as error:
        raise UserError(f"cannot pack: {error}; nothing was written to {out}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
