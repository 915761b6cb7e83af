"""Pack an image folder into tar shards: unchanged image files with their classes and boxes."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from saltern.pipeline.shards.box_files import Facts, open_boxes
from saltern.pipeline.shards.classes import FILE, IMAGENET, Vocabulary, imagenet_names, read_names
from saltern.pipeline.shards.expand import ENDINGS
from saltern.pipeline.shards.folder import Folder, Image, Remarks
from saltern.schemas.errors import UserError

SCRATCH = ".tmp-pack"  # `expand` ignores names that begin with a dot


@dataclass(slots=True)
class Packed:
    """Counts of the files that `pack` wrote and skipped."""

    shards: int = 0
    samples: int = 0
    classes: int = 0  # sub-folders with images; 0 for a flat folder
    bytes: int = 0  # of the tars
    remarks: Remarks = field(default_factory=Remarks)
    unboxed: int = 0  # images without an annotation, if boxes were requested


def pack(
    folder: Path,
    out: Path,
    *,
    per_shard: int = 1000,
    boxes: Path | None = None,
    classes: str | None = None,
    shuffle: int | None = 0,
) -> Packed:
    """Write `shard-000000.tar` and so on, and `classes.json`. The same folder and options give the same bytes.

    A sample's key is its path without the extension. Other dots in the file's name become dashes, as a key ends at the
    first dot. Members: the image; `cls`, the number of its class; `json` with `name`, the class's name, and `boxes`
    [[x0, y0, x1, y1]], inclusive pixels, `height` and `width` of the annotation. `classes.json` has the names of all
    classes by number. A folder without images is no class. The list of images is kept in memory: about 280
    bytes for each.

    Args:
        folder: one sub-folder per class, or only images.
        out: created if missing. The shards appear in it when all are written.
        per_shard: number of samples in a shard.
        boxes: ILSVRC annotations or a CSV file, as for `open_boxes`.
        classes: how the classes are numbered. None: by the sorted names of the sub-folders, as in torchvision's
            ImageFolder. `imagenet`, or a file of names as `classes.json`: by the folder's name (or WordNet id) there.
        shuffle: seed of the order of samples; None: the order of the sorted paths.

    Raises:
        UserError: no images, images next to class folders, shards in `out`, a damaged annotation, a folder that is none
            of the classes; files that cannot be read, of which nothing is packed.
    """
    _check(folder, out, per_shard)
    boxes_of = None if boxes is None else open_boxes(boxes)
    scratch = out / SCRATCH
    try:
        listed = Folder(folder)
        names = _names(folder, listed.classes, classes)
        packed = Packed(classes=len(names), remarks=listed.remarks)
        images = list(listed.images({name: number for name, (number, _) in names.items()}))
        if shuffle is not None:
            random.Random(shuffle).shuffle(images)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        table = dict(sorted(names.values()))
        if table:
            (scratch / FILE).write_text(json.dumps(table, indent=0) + "\n")
        _Packer(folder, table, boxes_of, packed).write(images, scratch, per_shard)
        for path in sorted(scratch.iterdir()):
            path.rename(out / path.name)
        return packed
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"packing {folder} failed, and no shard was left in {out}: {why}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(folder: Path, out: Path, per_shard: int) -> None:
    if per_shard < 1:
        raise UserError(f"--per-shard {per_shard}: at least one sample is needed")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: not a folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} lies in {folder} itself; give a folder outside of it")
    existing = [path.name for path in out.glob("*") if path.name.endswith(ENDINGS)]
    if existing:
        raise UserError(f"--out {out} already holds shards ({min(existing)}, ...); give another folder or remove them")


def _names(folder: Path, folders: Collection[str], classes: str | None) -> dict[str, tuple[int, str]]:
    """Return number and name of the class of each sub-folder."""
    if classes is None:
        return {name: (number, name) for number, name in enumerate(folders)}
    listed = dict(enumerate(imagenet_names())) if classes == IMAGENET else read_names(classes)
    vocabulary = Vocabulary([listed.get(number, "") for number in range(max(listed) + 1)])
    found = {name: vocabulary(name) for name in folders}
    strangers = [name for name, numbers in found.items() if len(numbers) != 1]
    if strangers or not folders:
        which = f"{len(strangers)} class folders ({', '.join(map(repr, strangers[:3]))})" if folders else "flat folder"
        raise UserError(
            f"--classes {classes}: {folder}: {which}: not one of its {len(listed)} classes; rename or move it"
        )
    numbers = {name: next(iter(number)) for name, number in found.items()}
    counts = Counter(numbers.values())
    twice = [name for name in folders if counts[numbers[name]] > 1]
    if twice:
        raise UserError(
            f"--classes {classes}: {' and '.join(map(repr, twice[:2]))} in {folder} are one class; join them"
        )
    return {name: (number, listed[number]) for name, number in numbers.items()}


@dataclass(frozen=True)
class _Packer:
    """Writes the shards of a folder."""

    folder: Path
    names: dict[int, str]
    boxes_of: Callable[[Image], Facts | None] | None  # None: no boxes were requested
    packed: Packed

    def write(self, images: Iterable[Image], scratch: Path, per_shard: int) -> None:
        images = iter(images)
        while batch := list(islice(images, per_shard)):
            path = scratch / f"shard-{self.packed.shards:06d}.tar"
            with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
                for image in batch:
                    tar.write(self._sample(image))
            self.packed.shards += 1
            self.packed.samples += len(batch)
            self.packed.bytes += path.stat().st_size

    def _sample(self, image: Image) -> dict[str, Any]:
        path = self.folder / image.name
        try:
            members: dict[str, Any] = {"__key__": image.key, image.ext: path.read_bytes()}
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}, although it could be read when packing began; no shard was left: repeat "
                "the command when nothing changes the folder"
            ) from error
        facts: dict[str, Any] = {}
        if image.label is not None:
            members["cls"] = str(image.label).encode()
            facts["name"] = self.names[image.label]
        if self.boxes_of is not None:
            boxes = self.boxes_of(image)
            self.packed.unboxed += boxes is None
            facts |= boxes or {}
        if facts:
            members["json"] = json.dumps(facts).encode()
        return members
