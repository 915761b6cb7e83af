"""A run as a contact sheet: for each row the photograph, the map over it, the mask and its box.

Shape suffixes: Y X a thumbnail of the whole upright original, h w a stored map's grid.
"""

import io
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from pipeline.contact_page import CROP, FOUND, GIVEN, Box, Card, Picture, View, render
from pipeline.decode import DecodeError, decode_image
from pipeline.reader import Row, SaliencyRun, over_frame
from pipeline.shards import Sample, read_samples
from schemas.errors import ShardError, UserError
from schemas.run import Shard
from schemas.saliency import OK, table_schema

SIDE = 320  # longer side of a thumbnail, pixels
_TOP = 0.995  # quantile of a map that gets the colours' end, so that one bright pixel does not darken a map
_INK = (45, 226, 255)  # of the mask's outline, RGB
_SORTS = [
    field.name for field in table_schema(None) if pa.types.is_integer(field.type) or pa.types.is_float32(field.type)
]
_VALUES = ("score", "mask_area", "label", "predicted", "target", "index")
_CROWDED = 0.1  # share of a picture; above it the mask is speckled
Pixels = NDArray[np.uint8]


def contact_sheet(run: SaliencyRun, sort: str | None = None, limit: int = 48) -> str:
    """An HTML page of the first `limit` rows, in shard order or, lowest first, by a column.

    Reads of each shard that it shows what lies before the last wanted sample. Where a shard cannot be read, its rows
    are shown without their image, and the page says so.

    Raises:
        UserError: no such column, or one that has no order.
        ShardError: a data file is gone, cut or of another run.
    """
    order, numbers = _order(run, sort), _choose(run, sort, limit)
    found = {number: run.at(number) for number in sorted(numbers)}  # neighbours are read together
    samples, names, gone = _samples(run, found.values())
    cards = [_card(found[number], samples.get((found[number].shard, found[number].index)), names) for number in numbers]
    counts = f"{len(cards):,} of {len(run):,} rows, {order}"
    config = run.run.config
    title = f"{config.method} of {config.model}"
    return render(title, [*_provenance(run), ("shown", counts)], gone, cards)


def _order(run: SaliencyRun, sort: str | None) -> str:
    if sort is None:
        return "in shard order"
    if sort == "status":
        return "sorted by status, failed rows first"
    if sort in _SORTS:
        return f"sorted by {sort}, lowest first, rows without one last"
    raise UserError(f"--sort {sort!r} is no column to sort by; these are: {', '.join(sorted([*_SORTS, 'status']))}")


def _choose(run: SaliencyRun, sort: str | None, limit: int) -> list[int]:
    """Numbers of the rows to show, in their order."""
    if sort is None or not len(run):
        return list(range(min(limit, len(run))))
    column = run.columns(sort)[sort]
    if sort == "status":
        # ok comes last, the others by name.
        column = pc.if_else(pc.equal(column, OK), pa.scalar(None, pa.string()), column)
    order: list[int] = pc.sort_indices(column)[:limit].to_pylist()
    return order


def _samples(run: SaliencyRun, rows: Iterable[Row]) -> tuple[dict[tuple[str, int], Sample], dict[int, str], list[str]]:
    """The rows' samples by (shard, index), class names as far as they were met, and what could not be read."""
    samples: dict[tuple[str, int], Sample] = {}
    names = dict(enumerate(run.run.class_names or []))
    gone: list[str] = []
    shards = {shard.name: shard for shard in run.shards}
    for name, group in groupby(rows, lambda row: row.shard):
        keys = {row.index: row.key for row in group}
        try:
            for sample in _read(shards[name], keys, names):
                samples[name, sample.index] = sample
        except (OSError, ShardError) as error:
            gone.append(f"{name}: shown without its images, which cannot be read ({error})")
    return samples, names, gone


def _read(shard: Shard, keys: dict[int, str], names: dict[int, str]) -> Iterable[Sample]:
    last = max(keys)
    for sample in read_samples(shard):
        name = _json(sample).get("name")
        if sample.label is not None and isinstance(name, str):
            names[sample.label] = name
        if sample.index in keys:
            if sample.key != keys[sample.index]:
                raise ShardError(f"it has {sample.key!r} where the run has {keys[sample.index]!r}")
            yield sample
        if sample.index == last:
            return


def _json(sample: Sample) -> dict[str, Any]:
    try:
        found = json.loads(sample.members.get("json", b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _provenance(run: SaliencyRun) -> list[tuple[str, str]]:
    config = run.run.config
    statuses: dict[str, int] = {}
    for receipt in run.receipts:
        for status, count in receipt.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    options = ", ".join(f"{name}={value}" for name, value in config.options.items())
    shape = f"squashed to {config.crop}" if config.squash else f"shorter side {config.resize}, crop {config.crop}"
    facts = {
        "run": run.path,
        "model": f"{config.model} (weights {config.weights}, {config.weights_digest[:12]})",
        "method": f"{config.method} {options}",
        "layer": ", ".join(config.layer),
        "target": config.target,
        "preprocess": f"{shape}, {config.interpolation}, mean {_numbers(config.mean)}, std {_numbers(config.std)}",
        "masks": config.discretize,
        "maps": f"{config.map_size}, {config.map_dtype}" if config.save_map else "not stored",
        "precision": config.precision,
        "shards": f"{len(run.shards):,} of {len(run.run.shards):,} done",
        "rows": ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items())),
        "fingerprint": run.run.fingerprint,
        "made with": ", ".join(f"{name} {version}" for name, version in run.run.versions.items()),
    }
    return [(name, value) for name, value in facts.items() if value]


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _card(row: Row, sample: Sample | None, names: dict[int, str]) -> Card:
    values = {name: getattr(row, name) for name in _VALUES}
    return Card(row.key, row.shard, row.status, [_view(row, sample, names)], values)


def _view(row: Row, sample: Sample | None, names: dict[int, str]) -> View:
    def named(label: int | None) -> str:
        return "" if label is None else f"{label} {names.get(label, '')}".strip()

    facts = {
        "label": named(row.label),
        "predicted": named(row.predicted),
        "target": named(row.target),
        "score": "" if row.score is None else f"{row.score:.3f}",
        "mask": "" if row.mask_area is None else f"{100 * row.mask_area:.1f} %",
        "box": "; ".join(" ".join(map(str, box)) for box in row.boxes or ()),
        "size": "" if row.image_width is None else f"{row.image_width} x {row.image_height}",
    }
    trouble = row.error or ""
    if row.image_width is not None and sample is None:
        trouble = f"{trouble} the image cannot be read".strip()
    return View(_pictures(row, sample, facts), [(name, fact) for name, fact in facts.items() if fact], trouble)


def _pictures(row: Row, sample: Sample | None, facts: dict[str, str]) -> list[Picture]:
    """Photograph, map, mask; those that can be had."""
    photo_YX3 = _thumbnail(row, sample)
    if photo_YX3 is None:
        return []
    height, width = photo_YX3.shape[:2]
    given = _given(sample, row)
    if row.geometry is None or row.image_width is None or row.image_height is None:
        return [_encode(photo_YX3, f"{row.key}: {row.status}", given)]
    scale_x, scale_y = width / row.image_width, height / row.image_height
    geometry = [part * scale for part, scale in zip(row.geometry, (scale_x, scale_y) * 2, strict=True)]
    crop = _crop(row.layout.input_shape, geometry, width, height)
    found = [_box(FOUND, box, row) for box in row.boxes or ()]
    class_ = facts["target"] or facts["label"]
    made = [_encode(photo_YX3, f"{row.key}, {class_}", [*given, *found])]
    if row.map_bytes is not None:
        heat = over_frame(_unit(row.map()), row.layout.input_shape, geometry, height, width)
        made.append(_encode(_heat(photo_YX3, heat), f"map of {row.key} for {class_}", crop))
    if row.mask_bytes is not None:
        mask = over_frame(row.mask().astype(np.float32), row.layout.input_shape, geometry, height, width) >= 0.5
        words = f"mask of {row.key}: {facts['mask']} of the input, box {facts['box'] or 'none'}"
        made.append(_encode(_cut_out(photo_YX3, mask), words, [*crop, *given, *found]))
    return made


def _thumbnail(row: Row, sample: Sample | None) -> Pixels | None:
    """The whole upright original, its longer side SIDE; a grey field where it cannot be had but its size is known."""
    if sample is not None and sample.image is not None:
        try:
            image = decode_image(sample.image)
        except DecodeError:
            return None
        return np.asarray(image.resize(_size(*image.size), Image.Resampling.BICUBIC, reducing_gap=3.0))
    if row.image_width is None or row.image_height is None:
        return None
    width, height = _size(row.image_width, row.image_height)
    return np.full((height, width, 3), 128, np.uint8)


def _size(width: int, height: int) -> tuple[int, int]:
    scale = SIDE / max(width, height)
    return max(1, round(scale * width)), max(1, round(scale * height))


def _given(sample: Sample | None, row: Row) -> list[Box]:
    """The boxes in the sample's json: x0 y0 x1 y1, both ends inside, original pixels."""
    boxes = [] if sample is None else _json(sample).get("boxes", [])
    try:
        ends = [[float(x0), float(y0), float(x1) + 1, float(y1) + 1] for x0, y0, x1, y1 in boxes]
    except (TypeError, ValueError):
        return []  # of another kind than ours
    return [_box(GIVEN, box, row) for box in ends if row.image_width]


def _box(kind: str, box: Sequence[float], row: Row) -> Box:
    width, height = row.image_width or 1, row.image_height or 1
    return Box(kind, box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def _crop(input_shape: tuple[int, int], geometry: list[float], width: int, height: int) -> list[Box]:
    """The part of the original that the network saw, where that is not all."""
    scale_x, scale_y, x0, y0 = geometry
    x1, y1 = x0 + scale_x * input_shape[1], y0 + scale_y * input_shape[0]
    whole = x0 < 1 and y0 < 1 and x1 > width - 1 and y1 > height - 1
    return [] if whole else [Box(CROP, x0 / width, y0 / height, x1 / width, y1 / height)]


def _unit(map_hw: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map in [0, 1] from its minimum to its _TOP quantile."""
    lo, hi = float(map_hw.min()), float(np.quantile(map_hw, _TOP))
    hi = hi if hi > lo else float(map_hw.max())
    return ((map_hw - lo) / (hi - lo if hi > lo else 1)).clip(0, 1).astype(np.float32)


def _heat(photo_YX3: Pixels, heat_YX: NDArray[np.float32]) -> Pixels:
    """The photograph under the map's colours; dim where there is no map."""
    seen_YX1 = np.isfinite(heat_YX)[..., None]
    levels = (np.nan_to_num(heat_YX) * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    return np.where(seen_YX1, 0.4 * photo_YX3 + 0.6 * colours, 0.3 * photo_YX3).round().astype(np.uint8)


def _cut_out(photo_YX3: Pixels, mask_YX: NDArray[np.bool_]) -> Pixels:
    """The photograph, dim outside of the mask, whose outline is drawn unless it would cover the rest."""
    made = np.where(mask_YX[..., None], photo_YX3, 0.3 * photo_YX3).round().astype(np.uint8)
    inner = cv2.erode(mask_YX.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1).astype(bool)
    outline = mask_YX & ~inner
    if outline.mean() < _CROWDED:
        made[outline] = _INK
    return made


def _encode(pixels_YX3: Pixels, words: str, boxes: Iterable[Box]) -> Picture:
    stream = io.BytesIO()
    Image.fromarray(pixels_YX3).save(stream, "JPEG", quality=75)
    height, width = pixels_YX3.shape[:2]
    return Picture(stream.getvalue(), width, height, words, tuple(boxes))
