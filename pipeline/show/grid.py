"""Save pictures of a run as PNG files."""

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from saltern.pipeline.storage.store import Store

_LINE = 16  # height of a caption, pixels
_GAP = 4
_SIDE = 224  # width and height of a picture, pixels


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a picture (H, W) or (H, W, 3) as the bytes of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def publish_grid(store: Store, name: str, cells: Iterable[tuple[str, Image.Image]], *, columns: int) -> None:
    """Save captioned pictures, in rows of `columns`, as one PNG file in the run's folder."""
    cells = list(cells)
    width, height = _SIDE + _GAP, _SIDE + _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-len(cells) // columns) * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, picture) in enumerate(cells):
        x, y = _GAP + number % columns * width, _GAP + number // columns * height
        draw.text((x, y), caption.encode("ascii", "replace").decode()[: _SIDE // 6], fill="black")
        sheet.paste(picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (x, y + _LINE))
    store.write(name, png(np.asarray(sheet)))
