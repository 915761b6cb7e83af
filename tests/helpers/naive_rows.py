"""Rows of an extraction one value at a time, and their file: the reference of the columns."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import ndimage

from saltern.pipeline.extract.extraction import REASONS

Record = dict[str, Any]


def original_box(box: Sequence[int], geometry: Sequence[float], height: int, width: int) -> list[int]:
    """Convert one box from input pixels to the original's: rounded, inside the image, at least one pixel."""
    scale_x, scale_y, offset_x, offset_y = geometry
    x0 = min(max(round(offset_x + scale_x * box[0]), 0), width - 1)
    y0 = min(max(round(offset_y + scale_y * box[1]), 0), height - 1)
    x1 = min(max(round(offset_x + scale_x * box[2]), x0 + 1), width)
    y1 = min(max(round(offset_y + scale_y * box[3]), y0 + 1), height)
    return [x0, y0, x1, y1]


def mask_box(mask_HW: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the box of the largest 4-connected component, the first of equals; None for an empty mask."""
    labels, count = ndimage.label(mask_HW)  # 4-connected, numbered in raster order
    if not count:
        return None
    sizes = [int((labels == label).sum()) for label in range(1, count + 1)]
    ys, xs = np.nonzero(labels == 1 + sizes.index(max(sizes)))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def write_records(path: Path, records: Iterable[Record], schema: pa.Schema) -> Path:
    """Write records in row groups of 512, as files of Saltern 0.1 were."""
    plain = [field.name for field in schema if "binary" in str(field.type)]
    records = list(records)
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[name for name in schema.names if name not in (*plain, "boxes", "geometry")],
        write_statistics=[name for name in schema.names if name not in plain],
        store_schema=True,
    ) as file:
        for start in range(0, len(records), 512):
            group = records[start : start + 512]
            columns = [pa.array([record.get(field.name) for record in group], field.type) for field in schema]
            file.write_batch(pa.record_batch(columns, schema=schema), row_group_size=len(group))
    return path


def extract_records(
    shard: str, batch: Any, explained: Any, input_shape: tuple[int, int], wanted: Sequence[str]
) -> list[Record]:
    """Return the records of a batch of an extraction, value by value.

    Args:
        shard: the shard's name.
        batch, explained: as a task's `rows` gets them.
        input_shape: of the network's input, pixels.
        wanted: the columns that the run has, of map, map_lo and map_hi.
    """
    records: list[Record] = []
    each = len(explained.status_R) // len(batch.decoded) if batch.decoded else 0
    for at, key in enumerate(batch.keys):
        record: Record = {"key": key, "shard": shard, "index": batch.indices[at], "label": batch.labels[at]}
        if at in batch.kept:
            records += batch.kept[at].to_pylist()
        elif at in batch.problems:
            status, error = batch.problems[at]
            records.append({**record, "status": status, "error": error})
        else:
            slot = batch.decoded.index(at)
            height, width = batch.size_D2[slot].tolist()
            geometry = batch.geometry_D4[slot].tolist()
            record |= {"image_height": height, "image_width": width, "geometry": geometry}
            for row in range(slot * each, slot * each + each):
                values = {name: column[row] for name, column in explained.columns.items()}
                status = ("ok", "zero_map", "nonfinite")[explained.status_R[row]]
                end = {"status": status, "error": REASONS.get(status)}
                records.append(
                    record | _explained(values, status, geometry, (height, width), input_shape, wanted) | end
                )
    return records


def _explained(
    values: dict[str, Any],
    status: str,
    geometry: list[float],
    size: tuple[int, int],
    input_shape: tuple[int, int],
    wanted: Sequence[str],
) -> Record:
    record: Record = {"predicted": int(values["predicted"])}
    if values["target"] >= 0:
        record |= {"target": int(values["target"]), "score": float(values["score"])}
    if status == "nonfinite":
        return record
    if "map" in wanted:
        height, width = values["map"].shape
        record |= {"map": values["map"].tobytes(), "map_height": height, "map_width": width}
        record |= {name: float(values[name]) for name in ("map_lo", "map_hi") if name in wanted}
    bits = np.unpackbits(values["mask"])[: input_shape[0] * input_shape[1]]
    box = mask_box(bits.reshape(input_shape).astype(bool))
    record |= {
        "mask": values["mask"].tobytes(),
        "mask_area": float(values["mask_area"]),
        "boxes": [] if box is None else [original_box(box, geometry, *size)],
    }
    return record | ({"mask_threshold": float(values["mask_threshold"])} if status == "ok" else {})


def over_original(map_HW: np.ndarray, geometry: Sequence[float], height: int, width: int) -> np.ndarray:
    """Return a map of the network's input at each pixel of the original, one by one: bilinear, NaN outside."""
    scale_x, scale_y, offset_x, offset_y = geometry
    rows, columns = map_HW.shape
    found = np.full((height, width), np.nan)
    for y in range(height):
        for x in range(width):
            at_y, at_x = (y + 0.5 - offset_y) / scale_y, (x + 0.5 - offset_x) / scale_x
            if 0 <= at_y < rows and 0 <= at_x < columns:
                top, left = (min(max(at - 0.5, 0), last - 1) for at, last in ((at_y, rows), (at_x, columns)))
                total = 0.0
                for corner_y in (int(top), min(int(top) + 1, rows - 1)):
                    for corner_x in (int(left), min(int(left) + 1, columns - 1)):
                        down, right = top - int(top), left - int(left)
                        weight = (down if corner_y > int(top) else 1 - down) if int(top) < rows - 1 else 0.5
                        weight *= (right if corner_x > int(left) else 1 - right) if int(left) < columns - 1 else 0.5
                        total += weight * float(map_HW[corner_y, corner_x])
                found[y, x] = total
    return found
