"""Pictures of a run's images, and its columns read back for them."""

import io
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from saltern.pipeline.runs.manifest import data_name, read_receipts
from saltern.pipeline.storage.store import Store
from saltern.schemas.run import Run

_LINE = 16  # height of a caption, pixels
_GAP = 4
_SIDE = 224  # of a cell, pixels


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture (H, W) or (H, W, 3) as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def read_columns(store: Store, run: Run, columns: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the shards that stand, in order; of the columns named nothing else is read."""
    done = read_receipts(store, run)
    for shard in run.shards:
        if shard.name not in done or limit == 0:
            continue
        file = pq.ParquetFile(store.full(data_name(shard.name)), filesystem=store.fs)
        for batch in file.iter_batches(min(512, limit or 512), columns=list(columns)):
            rows = batch.to_pylist()[:limit]
            yield from rows
            if limit is not None:
                limit -= len(rows)
                if limit == 0:
                    break


def publish_grid(
    store: Store, scratch: Path, name: str, cells: Iterable[tuple[str, Image.Image]], *, columns: int
) -> None:
    """Captioned pictures in rows of `columns`, as one PNG file of the run's folder."""
    cells = list(cells)
    width, height = _SIDE + _GAP, _SIDE + _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-len(cells) // columns) * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, picture) in enumerate(cells):
        x, y = _GAP + number % columns * width, _GAP + number // columns * height
        draw.text((x, y), caption.encode("ascii", "replace").decode()[: _SIDE // 6], fill="black")
        sheet.paste(picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (x, y + _LINE))
    made = scratch / uuid.uuid4().hex
    sheet.save(made, "PNG")
    store.publish(made, name)
