"""Export as one JSON file of COCO's format, which pycocotools opens.

A shard gives a part, the JSON texts of its images and annotations. The parts are joined in the run's order.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa

from saltern.pipeline.export.facts import OBJECT, classes, finite, to_json, with_files
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.export.rle import coco_rle
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row, SaliencyRun, mask_in_original
from saltern.schemas.run import Shard

FILE = "instances.json"


def read_images(run: SaliencyRun, shard: Shard) -> Iterator[tuple[int, Record | None]]:
    """Yield the number of rows of each sample of a shard, and its record (schemas.export); None without a size.

    Images are those whose size is known, by the names of their files in the tars. An annotation is a row with a mask
    that is not empty: `segmentation` is the mask over the upright original, `area` its pixels, `bbox` (x, y, width,
    height) the run's box, `score` the class's probability, `category_id` the class that the map explains.
    """
    for rows, file in with_files(run, shard):
        first = rows[0]
        if first.image_height is None or first.image_width is None:
            yield len(rows), None
            continue
        size = {"width": first.image_width, "height": first.image_height}
        found = [(row, annotation) for row in rows if (annotation := _annotation(row)) is not None]
        yield (
            len(rows),
            {
                "image": _text({"file_name": file, **size, "key": first.key, "shard": shard.name}),
                "annotations": [_text(annotation) for _, annotation in found],
                "classless": any(row.target is None for row, _ in found),
            },
        )


def _annotation(row: Row) -> dict[str, Any] | None:
    mask_YX = None if row.mask_bytes is None else mask_in_original(row)
    if mask_YX is None or not mask_YX.any() or not row.boxes:
        return None
    x0, y0, x1, y1 = row.boxes[0]
    return {
        "category_id": row.target or 0,
        "segmentation": {"size": list(mask_YX.shape), "counts": coco_rle(mask_YX)},
        "area": int(mask_YX.sum()),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": finite(row.score),
        "iscrowd": 0,
    }


def _text(entry: dict[str, Any]) -> str:
    return to_json(entry).decode()


def join_parts(folder: Folder, run: SaliencyRun, parts: Iterable[pa.RecordBatch]) -> None:
    """Write `instances.json` from the records of the shards. The annotations wait in a second file."""
    agnostic = False
    with folder.file(FILE) as stream, folder.spool() as found:
        images, annotations = _Entries(stream), _Entries(found)
        stream.write(b'{"info": ' + to_json({"description": _description(run)}) + b',\n"images": [')
        for part in parts:
            for record in part.to_pylist():
                image = images.add({}, record["image"])
                for text in record["annotations"]:
                    annotations.add({"image_id": image}, text)
                agnostic = agnostic or record["classless"]
        stream.write(b'],\n"annotations": [')
        found.seek(0)
        shutil.copyfileobj(found, stream)
        names = {0: OBJECT} if agnostic else classes(run)
        listed = [{"id": number, "name": name} for number, name in names.items()]
        stream.write(b'],\n"categories": ' + to_json(listed) + b"}\n")


def _description(run: SaliencyRun) -> str:
    return f"{run.config.method} of {run.config.model}, by saltern, fingerprint {run.run.fingerprint}"


class _Entries:
    """Entries of a JSON list, counted from 1."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.count = 0

    def add(self, ids: dict[str, int], text: str) -> int:
        """Write an object's text with the next number as its id, and further ids. Returns that number."""
        self._stream.write(b",\n" if self.count else b"\n")
        self.count += 1
        head = json.dumps({"id": self.count, **ids})
        self._stream.write(f"{head[:-1]}, {text[1:]}".encode())
        return self.count
