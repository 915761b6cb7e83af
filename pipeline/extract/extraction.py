"""What the processor does with its samples in `extract`: explain them on the device, make them rows."""

from dataclasses import replace
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from saltern.pipeline.extract.explain import Explained, Explainer, Pending
from saltern.pipeline.methods import Method, build
from saltern.pipeline.models import classifiers
from saltern.pipeline.rows import Item, Storage, assemble
from saltern.pipeline.runs.outlet import Spec, check_weights, origin
from saltern.pipeline.runs.writer import Row
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.run import RunConfig, Shard
from saltern.schemas.saliency import MISSING_LABEL, table_schema, with_metadata


class Work(Protocol):
    """What a job does with samples; made and called in the thread that owns the device, but for `rows`."""

    schema: pa.Schema  # of the data files; begins with key, shard, index, ends with status, error

    def __call__(self, pixels_BHWC: Tensor, label_B: Tensor, seed_B: Tensor) -> Pending:
        """Begin one batch, on the host as yet: pixels uint8, labels and seeds int64."""

    def problem(self, sample: Sample) -> tuple[str, str] | None:
        """Status and reason where a sample with an image cannot be worked on all the same."""

    def rows(self, shard: Shard, batch: list[Item], found: Explained | None) -> list[Row]:
        """Rows of a settled batch, in its order."""


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
