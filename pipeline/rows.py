"""Samples on their way through the processor, and the rows that they become."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from saltern.pipeline.extract.explain import Explained
from saltern.pipeline.maps.discretize import largest_box, to_original
from saltern.pipeline.maps.encode import unpack_mask
from saltern.pipeline.runs.writer import Row
from saltern.pipeline.shards.decode import Decoded, DecodeError
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.saliency import NONFINITE, OK, ZERO_MAP

_REASONS = {
    OK: None,
    ZERO_MAP: "the method gave zeros everywhere",
    NONFINITE: "the map is not finite, or does not fit the stored dtype",
}
Decoding = Future[tuple[Decoded, float]]  # with its thread seconds


@dataclass
class Item:
    """A sample that is being decoded, has failed before the method, or is kept from an earlier run."""

    sample: Sample
    decoding: Decoding | None = None
    problem: tuple[str, str] | None = None  # status, reason
    kept: list[Row] | None = None
    decoded: Decoded | None = None

    def settle(self) -> float:
        """Wait for the decoding; returns its thread seconds."""
        if self.decoding is None:
            return 0.0
        try:
            self.decoded, seconds = self.decoding.result()
        except DecodeError as error:
            self.problem, seconds = (error.status, error.reason), 0.0
        return seconds


@dataclass(frozen=True)
class Storage:
    """How the maps and masks of a run are stored."""

    shard: str  # name
    map_shape: tuple[int, int] | None  # cells; None where maps are not stored
    scaled: bool  # uint8: lo and hi belong to the map
    input_shape: tuple[int, int]  # pixels


def assemble(items: Sequence[Item], found: Explained | None, each: int, storage: Storage) -> list[Row]:
    """Rows of a batch, in the order of saltern.schemas.saliency.table_schema.

    Args:
        items: settled.
        found: what the device gave for the decoded ones among them, `each` rows a sample; None where there are none.
        each: rows of a decoded sample.
        storage: how maps and masks are stored.
    """
    rows: list[Row] = []
    at = 0
    for item in items:
        if item.kept is not None:
            rows += item.kept
        elif item.decoded is None or found is None:
            rows.append(_failed(item, storage))
        else:
            rows += [_explained(item, item.decoded, found, row, storage) for row in range(at, at + each)]
            at += each
    return rows


def _failed(item: Item, storage: Storage) -> Row:
    sample, (status, reason) = item.sample, item.problem or ("", "")
    return (sample.key, storage.shard, sample.index, sample.label, *[None] * 15, status, reason)


def _explained(item: Item, decoded: Decoded, found: Explained, row: int, storage: Storage) -> Row:
    status, columns = found.statuses[row], found.columns
    target = int(columns["target"][row])
    score = None if target < 0 else float(columns["score"][row])
    return (
        item.sample.key,
        storage.shard,
        item.sample.index,
        item.sample.label,
        int(columns["predicted"][row]),
        None if target < 0 else target,
        score,
        *_map_columns(columns, row, storage, status),
        *_mask_columns(columns, row, storage, status, decoded),
        decoded.image_height,
        decoded.image_width,
        list(decoded.geometry),
        status,
        _REASONS[status],
    )


def _map_columns(columns: dict[str, Any], row: int, storage: Storage, status: str) -> tuple[Any, ...]:
    if storage.map_shape is None or status == NONFINITE:
        return (None,) * 5
    scale = (float(columns["map_lo"][row]), float(columns["map_hi"][row])) if storage.scaled else (None, None)
    return (columns["map"][row].tobytes(), *storage.map_shape, *scale)


def _mask_columns(
    columns: dict[str, Any], row: int, storage: Storage, status: str, decoded: Decoded
) -> tuple[Any, ...]:
    if status == NONFINITE:
        return (None,) * 4
    raw = columns["mask"][row].tobytes()
    box = largest_box(unpack_mask(raw, storage.input_shape))
    boxes = [] if box is None else [to_original(box, decoded.geometry, decoded.image_height, decoded.image_width)]
    threshold = float(columns["mask_threshold"][row]) if status == OK else None
    return raw, threshold, float(columns["mask_area"][row]), boxes
