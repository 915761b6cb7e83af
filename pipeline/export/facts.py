"""What several formats say of a row: its values as JSON, names of its classes and of its files."""

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import groupby, zip_longest
from typing import Any
from urllib.parse import quote

from saltern.pipeline.engine.derived import reading_tar
from saltern.pipeline.runs.reader import Row, SaliencyRun
from saltern.pipeline.shards.samples import list_images
from saltern.schemas.errors import ShardError
from saltern.schemas.run import Shard

OBJECT = "object"  # the class of a method's maps that explain none
_LONGEST = 200  # bytes of a part of a file's name, without its ending; file systems allow 255
_PLAIN = (
    *("key", "shard", "index", "label", "predicted", "target", "score", "mask_threshold", "mask_area", "boxes"),
    *("image_height", "image_width", "geometry", "status", "error"),
)


def values(row: Row) -> dict[str, Any]:
    """Return the values of a row, without map and mask, for JSON."""
    height, width = row.layout.input_shape
    found = {name: getattr(row, name) for name in _PLAIN} | {"input_height": height, "input_width": width}
    return {name: finite(value) if isinstance(value, float) else value for name, value in found.items()}


def to_json(content: object) -> bytes:
    """Return JSON in one line."""
    return json.dumps(content, allow_nan=False).encode()


def finite(number: float | None) -> float | None:
    """Return the number, or None for NaN and infinity, which JSON does not have."""
    return number if number is not None and math.isfinite(number) else None


def samples(run: SaliencyRun, shard: Shard) -> Iterator[list[Row]]:
    """Yield the rows of each sample of a shard, in order."""
    for _, group in groupby(run.read(shard), lambda row: row.index):
        yield list(group)


def with_files(run: SaliencyRun, shard: Shard) -> Iterator[tuple[list[Row], str | None]]:
    """Yield the rows of each sample with the name of its image file in the tar; None if it has no image.

    Raises:
        ShardError: the tar is gone or damaged, or does not hold the samples of the run.
        OSError: an error of the environment, worth a retry.
    """
    files = _images(run, shard)
    for rows, file in zip_longest(samples(run, shard), files):
        if rows is None or file is None or rows[0].key != file[0]:
            there = "ends" if file is None else f"has {file[0]!r}"
            here = "ends" if rows is None else f"{rows[0].key!r} at {rows[0].index}"
            raise ShardError(f"{shard.url} {there} where the run has {here}; `saltern verify {run.path}` says more")
        yield rows, file[1]


def _images(run: SaliencyRun, shard: Shard) -> Iterator[tuple[str, str | None]]:
    with reading_tar(shard):
        yield from list_images(run.tar(shard), named=run.config.members)


def classes(run: SaliencyRun) -> dict[int, str]:
    """Return the names of the classes that maps can explain, by number."""
    names = run.run.class_names or ()
    return {number: names[number] if number < len(names) else f"{number}" for number in range(run.config.classes)}


def safe(key: str) -> str:
    """Return a path for a key, which leads nowhere else and differs for different keys.

    Slashes make folders. In their parts, bytes that a file system or a shell could mistake are written as %XX.
    """
    return "/".join(_safe(part) for part in key.split("/"))


def _safe(part: str) -> str:
    name = quote(part, safe=" !#$&'()+,;=@[]^{}~") or "%"
    name = f"%2E{name[1:]}" if name.startswith(".") else name
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 33]}%{hashlib.sha256(part.encode()).hexdigest()[:32]}"
