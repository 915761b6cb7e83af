"""What the processor does with its samples in `extract`: explain them on the device, make them rows."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.engine.conduct import (
    Job,
)
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.extract.processor import Processor
from saltern.pipeline.extract.request import ExtractRequest, resolve
from saltern.pipeline.extract.task import Explained, Item, Pending
from saltern.pipeline.maps.discretize import largest_box
from saltern.pipeline.maps.encode import unpack_mask
from saltern.pipeline.maps.frame import to_original
from saltern.pipeline.methods import Method, build
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.outlet import Spec, origin
from saltern.pipeline.runs.writer import Row
from saltern.pipeline.shards.decode import Decoded
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.errors import UserError
from saltern.schemas.run import RunConfig, Shard
from saltern.schemas.saliency import MISSING_LABEL, NONFINITE, OK, ZERO_MAP, table_schema, with_metadata


class Extraction:
    """Maps, masks and boxes of a method."""

    def __init__(self, spec: Spec, device: torch.device):
        self._config = spec.run.config
        self._explain = Explainer(load_method(self._config, device)[1], self._config, device)
        crop = self._config.crop
        grey_BHWC = torch.full((1, crop, crop, 3), 127, dtype=torch.uint8)
        # The grid of the maps comes from explaining one grey image.
        pending = self._explain(grey_BHWC, torch.zeros(1, dtype=torch.long))
        stored = pending.wait()[0].columns.get("map")
        shape = None if stored is None else (int(stored.shape[1]), int(stored.shape[2]))
        provenance = {
            **origin(spec.run),
            "map_dtype": self._config.map_dtype,
            "map_shape": shape,
            "map_clip_quantile": self._explain.clip_quantile,
            "input_shape": [crop, crop],
            "mask_bit_order": "big",
        }
        self.schema = with_metadata(table_schema(None if stored is None else stored[0].nbytes), provenance)
        self._storage = Storage("", shape, self._config.map_dtype == "uint8", (crop, crop))

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        return self._explain(pixels_BHWC, label_B, seed_B)

    def problem(self, sample: Sample) -> tuple[str, str] | None:
        if self._config.target != "label" or not self._explain.method.needs_target:
            return None
        if sample.label is None:
            return MISSING_LABEL, "the target is the label, and the sample has no `cls` that is a number"
        if not 0 <= sample.label < self._config.classes:
            return (
                MISSING_LABEL,
                f"label {sample.label} lies outside the model's classes 0..{self._config.classes - 1}",
            )
        return None

    def rows(self, shard: Shard, batch: list[Item], found: Explained | None) -> list[Row]:
        return assemble(batch, found, self._explain.rows_each, replace(self._storage, shard=shard.name))


def load_model(config: RunConfig, device: torch.device) -> nn.Module:
    """The run's model on the device. Raises UserError where its weights are not the run's."""
    classifier = classifiers.load(config.model, config.weights, seed=config.seed)
    check_weights(config, classifier.digest)
    model = classifier.model.to(device)
    return model if config.precision == "fp32" else model.to(memory_format=torch.channels_last)


def load_method(config: RunConfig, device: torch.device) -> tuple[nn.Module, Method]:
    """The run's model, and its method on it."""
    model = load_model(config, device)
    return model, build(config.method, model, layer=next(iter(config.layer), None), **config.options)


def extraction(request: ExtractRequest) -> Job:
    """The job of `saltern extract`."""
    return Job(partial(resolve, request), partial(Processor, task=Extraction))


def check_weights(config: RunConfig, digest: str) -> None:
    """Raises UserError where the weights that were loaded here are not the run's."""
    if digest != config.weights_digest:
        raise UserError(
            f"the weights of {config.model} on {socket.gethostname()} are not the run's "
            f"(digest {digest[:12]}, the run has {config.weights_digest[:12]}): "
            "give the same file everywhere with --weights, or seed your factory"
        )


_REASONS = {
    OK: None,
    ZERO_MAP: "the method gave zeros everywhere",
    NONFINITE: "the map is not finite, or does not fit the stored dtype",
}


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
