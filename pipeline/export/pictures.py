"""Export as grey PNG files of the size of the original images."""

import cv2
import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.export.facts import safe, samples
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.runs.reader import Row, SaliencyRun, map_in_original, mask_in_original
from saltern.schemas.run import Shard


def write_pictures(folder: Folder, run: SaliencyRun, shard: Shard) -> int:
    """Write `<shard>/<key>.map.png` and `<key>.mask.png`, over the upright originals; outside of the crop they are 0.

    A map's grey levels go from its smallest value (0) to its largest (255). A run of several targets numbers them by
    rank: `<key>.map.0.png`. Rows without a map or a mask have no such file.

    Returns:
        The number of rows.
    """
    ranked, rows = run.config.target.kind == "top", 0
    for group in samples(run, shard):
        for number, row in enumerate(group):
            stem, rank = f"{shard.name}/{safe(row.key)}", f".{number}" if ranked else ""
            if row.map_bytes is not None:
                folder.write(f"{stem}.map{rank}.png", png(_grey(row)))
            if row.mask_bytes is not None:
                folder.write(f"{stem}.mask{rank}.png", png(mask_in_original(row)))
        rows += len(group)
    return rows


def _grey(row: Row) -> NDArray[np.uint8]:
    map_YX = map_in_original(row)
    lowest, highest = (float(level) for level in (row.map().min(), row.map().max()))
    span = highest - lowest if highest > lowest else 1.0
    grey_YX: NDArray[np.uint8] = np.nan_to_num((map_YX - lowest) / span * 255).round().clip(0, 255).astype(np.uint8)
    return grey_YX


def png(grey_YX: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    """Return a grey picture, or a mask as 0 and 255, as a PNG file of 8 bits."""
    levels_YX = grey_YX.astype(np.uint8) * (255 if grey_YX.dtype == np.bool_ else 1)
    written, content = cv2.imencode(".png", levels_YX)
    if not written:
        raise ValueError(f"a picture of {grey_YX.shape} cannot be written as PNG")
    return bytes(content)
