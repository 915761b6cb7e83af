"""Export as tasks with predictions that Label Studio imports."""

from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from saltern.pipeline.export.facts import OBJECT, classes, finite, to_json, with_files
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.export.rle import brush_rle
from saltern.pipeline.runs.reader import Row, SaliencyRun, mask_in_original
from saltern.schemas.errors import printable
from saltern.schemas.run import Shard

LABELS = "labels.xml"
_LOCAL = "/data/local-files/?d="  # Label Studio's URLs of files in its local storage
_VIEW = """<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="box" toName="image">
{labels}
  </RectangleLabels>
  <BrushLabels name="mask" toName="image">
{labels}
  </BrushLabels>
</View>
"""


def write_tasks(folder: Folder, run: SaliencyRun, shard: Shard) -> int:
    """Write `<shard>.json`, the tasks of a shard's samples.

    A task is a sample whose image has a known size, with a prediction for each row: its boxes in percent of the
    image's sides, and its mask as brush strokes.

    Returns:
        The number of rows.
    """
    tasks, count, comma = _Tasks(run), 0, b"[\n"
    with folder.file(f"{shard.name}.json") as stream:
        for rows, file in with_files(run, shard):
            count += len(rows)
            if file is None or rows[0].image_width is None:
                continue
            stream.write(comma + to_json(tasks.task(rows, file)))
            comma = b",\n"
        stream.write(b"\n]\n" if comma != b"[\n" else b"[]\n")
    return count


def write_labels(folder: Folder, run: SaliencyRun) -> None:
    """Write `labels.xml`, the project's labelling config."""
    names = [OBJECT, *_Tasks(run).labels.values()]
    listed = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in names)
    folder.write(LABELS, _VIEW.format(labels=listed).encode())


class _Tasks:
    def __init__(self, run: SaliencyRun):
        self._version = f"saltern {run.config.method} {run.config.model} {run.run.fingerprint}"
        # Two classes of ImageNet have one name.
        names = classes(run) if run.run.class_names else dict.fromkeys(classes(run), "")
        self.labels = {number: printable(f"{number} {name}".strip()) for number, name in names.items()}

    def task(self, rows: list[Row], file: str) -> dict[str, Any]:
        data = {"image": _LOCAL + quote(file), "key": rows[0].key, "shard": rows[0].shard}
        return {"data": data, "predictions": [self._prediction(row) for row in rows if row.boxes]}

    def _prediction(self, row: Row) -> dict[str, Any]:
        label = OBJECT if row.target is None else self.labels[row.target]
        result = [_box(row, box, label, number) for number, box in enumerate(row.boxes or ())]
        if row.mask_bytes is not None:
            strokes = {"format": "rle", "rle": brush_rle(mask_in_original(row)), "brushlabels": [label]}
            result.append(_region(row, "mask", "brushlabels", strokes, "mask"))
        return {"model_version": self._version, "score": finite(row.score), "result": result}


def _box(row: Row, box: list[int], label: str, number: int) -> dict[str, Any]:
    width, height = (row.image_width or 1) / 100, (row.image_height or 1) / 100
    x0, y0, x1, y1 = box
    percent = {"x": x0 / width, "y": y0 / height, "width": (x1 - x0) / width, "height": (y1 - y0) / height}
    return _region(row, "box", "rectanglelabels", percent | {"rotation": 0, "rectanglelabels": [label]}, f"box{number}")


def _region(row: Row, tag: str, kind: str, value: dict[str, Any], name: str) -> dict[str, Any]:
    size = {"original_width": row.image_width, "original_height": row.image_height, "image_rotation": 0}
    where = {"from_name": tag, "to_name": "image", "type": kind}
    return {"id": f"{row.index}-{row.target}-{name}", **where, **size, "value": value}
