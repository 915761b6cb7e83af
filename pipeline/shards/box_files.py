"""Read the boxes of images from ILSVRC annotations, one file for each image, or from a CSV file."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from saltern.pipeline.shards.folder import Image
from saltern.schemas.errors import UserError

COLUMNS = ("image", "x0", "y0", "x1", "y1")  # of a CSV file
_MAX_XML = 2**20  # bytes
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SIZE = ("height", "width")
Facts = dict[str, Any]  # `boxes` [[x0, y0, x1, y1]], inclusive pixels; `height` and `width`, if given


def open_boxes(path: Path) -> Callable[[Image], Facts | None]:
    """Return a function that gives the boxes of an image; None if it has no annotation.

    Args:
        path: a folder of ILSVRC annotations, as CLASS/STEM.xml or STEM.xml in it or in its sub-folder Annotation; or a
            CSV file with a line for each box: COLUMNS, and `height` and `width` of the image if they are known.
            `image` is the path in the packed folder, or the file's name, each with or without its extension.

    Raises:
        UserError: there is no such folder or file, or no annotation in it, or the CSV file is damaged.
    """
    if path.is_file():
        found = _read_csv(path)
        return lambda image: next((found[name] for name in _names(image) if name in found), None)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if next(path.rglob("*.xml"), None) is None:
        raise UserError(f"--boxes {path}: no .xml file below it")

    def read(image: Image) -> Facts | None:
        annotation = _annotation(image, path)
        return None if annotation is None else read_ilsvrc(annotation)

    return read


def read_ilsvrc(path: Path) -> Facts:
    """Return boxes, height and width of an ILSVRC annotation. Raises UserError if the file is none."""
    raw = path.read_bytes()
    # A document type can declare entities that expand without limit. ILSVRC's files have none, and no other encoding.
    if len(raw) > _MAX_XML or any(mark in raw for mark in (b"<!DOCTYPE", b"<!ENTITY", b"\0")):
        raise UserError(f"{path}: refused: an ILSVRC annotation declares no document type and is not that large")
    try:
        tree = ElementTree.fromstring(raw)  # noqa: S314 - see above
        boxes = [[_pixels(thing.findtext(f"bndbox/{name}")) for name in _CORNERS] for thing in tree.iter("object")]
        return {"boxes": boxes, **{name: _pixels(tree.findtext(f"size/{name}")) for name in _SIZE}}
    except (ElementTree.ParseError, ValueError, OverflowError, LookupError) as error:
        raise UserError(f"{path}: not an ILSVRC annotation ({error}); restore or remove it") from error


def _annotation(image: Image, boxes: Path) -> Path | None:
    name = f"{Path(image.name).stem}.xml"
    folders = [boxes / "Annotation", boxes]
    if image.label is not None:
        folders = [place for folder in folders for place in (folder / image.name.partition("/")[0], folder)]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read_csv(path: Path) -> dict[str, Facts]:
    """Return the facts by the names in the column `image`."""
    found: dict[str, Facts] = {}
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {*COLUMNS} <= {*(reader.fieldnames or ())}:
                raise ValueError(f"its first line must name the columns {','.join(COLUMNS)}")
            for row in reader:
                line = reader.line_num
                facts = found.setdefault(row["image"] or "", {"boxes": []})
                facts["boxes"].append([_pixels(row[name]) for name in COLUMNS[1:]])
                facts |= {name: _pixels(row[name]) for name in _SIZE if row.get(name)}
    except (ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"--boxes {path}, line {line}: {error}; correct it, or leave the line out") from error
    if not found:
        raise UserError(f"--boxes {path}: no box in it")
    return found


def _names(image: Image) -> Iterator[str]:
    """Yield the names that an image may have in a CSV file."""
    path = Path(image.name)
    yield from (image.name, path.with_suffix("").as_posix(), path.name, path.stem)


def _pixels(text: str | None) -> int:
    if text is None:
        raise ValueError("an edge or a size is missing")
    return round(float(text))
