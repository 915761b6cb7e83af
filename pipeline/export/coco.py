"""Export as one JSON file of COCO's format, which pycocotools opens."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import IO, Any

from saltern.pipeline.export.facts import OBJECT, Take, classes, finite, to_json, with_files
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.export.rle import coco_rle
from saltern.pipeline.runs.reader import Row, SaliencyRun, mask_in_original
from saltern.schemas.run import Shard

FILE = "instances.json"


@contextlib.contextmanager
def annotations(folder: Folder, run: SaliencyRun) -> Iterator[Take]:
    """Open `instances.json`, and yield the function that adds a shard to it.

    Images are those whose size is known, by the names of their files in the tars. An annotation is a row with a mask
    that is not empty: `segmentation` is the mask over the upright original, `area` its pixels, `bbox` (x, y, width,
    height) the run's box, `score` the class's probability, `category_id` the class that the map explains. The
    annotations wait in a second file until the images are written.
    """
    with folder.file(FILE) as stream, folder.spool() as found:
        made = _Coco(run, _Entries(stream), _Entries(found))
        stream.write(b'{"info": ' + to_json({"description": _description(run)}) + b',\n"images": [')
        yield made.add
        stream.write(b'],\n"annotations": [')
        found.seek(0)
        shutil.copyfileobj(found, stream)
        names = {0: OBJECT} if made.agnostic else classes(run)
        listed = [{"id": number, "name": name} for number, name in names.items()]
        stream.write(b'],\n"categories": ' + to_json(listed) + b"}\n")


def _description(run: SaliencyRun) -> str:
    return f"{run.config.method} of {run.config.model}, by saltern, fingerprint {run.run.fingerprint}"


class _Entries:
    """Entries of a JSON list, counted from 1."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.count = 0

    def add(self, entry: dict[str, Any]) -> int:
        """Write an entry with the next number as its id, and return that."""
        self._stream.write(b",\n" if self.count else b"\n")
        self.count += 1
        self._stream.write(to_json({"id": self.count, **entry}))
        return self.count

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Drop the entries of the block if it raises."""
        place, count = self._stream.tell(), self.count
        try:
            yield
        except BaseException:
            self._stream.seek(place)
            self._stream.truncate()
            self.count = count
            raise


class _Coco:
    def __init__(self, run: SaliencyRun, images: _Entries, found: _Entries):
        self._run, self._images, self._found = run, images, found
        self.agnostic = False  # whether maps explain no class

    def add(self, shard: Shard) -> int:
        """Add a shard, or nothing if it cannot be read. Returns the number of its rows."""
        count = 0
        with self._images.whole(), self._found.whole():
            for rows, file in with_files(self._run, shard):
                count += len(rows)
                first = rows[0]
                if first.image_height is None or first.image_width is None:
                    continue
                size = {"width": first.image_width, "height": first.image_height}
                image = self._images.add({"file_name": file, **size, "key": first.key, "shard": shard.name})
                for row in rows:
                    self._annotate(row, image)
        return count

    def _annotate(self, row: Row, image: int) -> None:
        mask_YX = None if row.mask_bytes is None else mask_in_original(row)
        if mask_YX is None or not mask_YX.any() or not row.boxes:
            return
        self.agnostic = self.agnostic or row.target is None
        x0, y0, x1, y1 = row.boxes[0]
        self._found.add(
            {
                "image_id": image,
                "category_id": row.target or 0,
                "segmentation": {"size": list(mask_YX.shape), "counts": coco_rle(mask_YX)},
                "area": int(mask_YX.sum()),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": finite(row.score),
                "iscrowd": 0,
            }
        )
