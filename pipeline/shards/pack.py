"""Pack an image folder into tar shards: unchanged image files with their classes and boxes."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from webdataset.writer import TarWriter

from saltern.pipeline.shards.classes import FILE, IMAGENET, Vocabulary, imagenet_names, read_names
from saltern.pipeline.shards.expand import ENDINGS
from saltern.pipeline.shards.folder import Folder, Image, Remarks
from saltern.schemas.errors import UserError

SCRATCH = ".tmp-pack"  # `expand` ignores names that begin with a dot
_MAX_XML = 2**20  # bytes
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


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
        boxes: ILSVRC annotations, as CLASS/STEM.xml or STEM.xml, in it or in its sub-folder Annotation.
        classes: how the classes are numbered. None: by the sorted names of the sub-folders, as in torchvision's
            ImageFolder. `imagenet`, or a file of names as `classes.json`: by the folder's name (or WordNet id) there.
        shuffle: seed of the order of samples; None: the order of the sorted paths.

    Raises:
        UserError: no images, images next to class folders, shards in `out`, a damaged annotation, a folder that is none
            of the classes; files that cannot be read, of which nothing is packed.
    """
    _check(folder, out, per_shard, boxes)
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
        _Packer(folder, table, boxes, packed).write(images, scratch, per_shard)
        for path in sorted(scratch.iterdir()):
            path.rename(out / path.name)
        return packed
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"packing {folder} failed, and no shard was left in {out}: {why}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(folder: Path, out: Path, per_shard: int, boxes: Path | None) -> None:
    if per_shard < 1:
        raise UserError(f"--per-shard {per_shard}: at least one sample is needed")
    for needed in (folder, boxes):
        if needed is not None and not needed.is_dir():
            raise UserError(f"{needed}: no such folder")
    if boxes is not None and next(boxes.rglob("*.xml"), None) is None:
        raise UserError(f"--boxes {boxes}: no .xml file below it")
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
    boxes: Path | None
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
        if self.boxes is not None:
            annotation = _annotation(image, self.boxes)
            self.packed.unboxed += annotation is None
            facts |= read_ilsvrc(annotation) if annotation else {}
        if facts:
            members["json"] = json.dumps(facts).encode()
        return members


def _annotation(image: Image, boxes: Path) -> Path | None:
    name = f"{Path(image.name).stem}.xml"
    folders = [boxes / "Annotation", boxes]
    if image.label is not None:
        folders = [place for folder in folders for place in (folder / image.name.partition("/")[0], folder)]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_ilsvrc(path: Path) -> dict[str, Any]:
    """Return `boxes` [[x0, y0, x1, y1]], inclusive pixels, `height` and `width` of an ILSVRC annotation.

    Raises:
        UserError: the file is not an ILSVRC annotation.
    """
    raw = path.read_bytes()
    # A document type can declare entities that expand without limit. ILSVRC's files have none, and no other encoding.
    if len(raw) > _MAX_XML or any(mark in raw for mark in (b"<!DOCTYPE", b"<!ENTITY", b"\0")):
        raise UserError(f"{path}: refused: an ILSVRC annotation declares no document type and is not that large")
    try:
        tree = ElementTree.fromstring(raw)  # noqa: S314 - see above
        boxes = [[_pixels(thing, f"bndbox/{corner}") for corner in _CORNERS] for thing in tree.iter("object")]
        return {"boxes": boxes, "height": _pixels(tree, "size/height"), "width": _pixels(tree, "size/width")}
    except (ElementTree.ParseError, ValueError, OverflowError, LookupError) as error:
        raise UserError(f"{path}: not an ILSVRC annotation ({error}); restore or remove it") from error


def _pixels(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"{path} is missing")
    return round(float(text))
