"""The family `sanity`: the cascade of each image's map, as one family of metrics is measured.

Shape suffixes: M measured samples, B batch, C H W the network's input.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from saltern.pipeline.extract.extraction import build_method, load_method
from saltern.pipeline.metrics.controls import sample_seeds
from saltern.pipeline.metrics.family import Batch, Family
from saltern.pipeline.metrics.processor import seen
from saltern.pipeline.metrics.sanity.cascade import Cascade, cascade
from saltern.pipeline.metrics.sanity.randomise import Randomised, layers_from_the_logits
from saltern.pipeline.runs.columns import Record
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import SANITY
from saltern.schemas.metrics import Metric
from saltern.schemas.saliency import OK, ZERO_MAP

MAPPED = (OK, ZERO_MAP)  # statuses of rows with a map


class SanityFamily(Family):
    """The cascade of the maps of a run's method, on its own model. A stage has one pass over each batch.

    The random weights follow from the run's seed, so all workers have the same.
    """

    name = SANITY
    metrics: ClassVar[dict[str, Metric]] = {}  # they are no means of one column: sanity/verdict.py
    needs_pixels = True

    def __init__(self, config: ExtractConfig, how: EvaluateConfig, device: torch.device):
        super().__init__(config, how, device)
        self.model, method = load_method(config, device)
        apart = all(network is not self.model for network in method.networks())
        method.close()
        if apart:
            raise UserError(f"the maps of {config.method} come from a network of its own, not from {config.model}")
        self._build = partial(build_method, config)
        layers = layers_from_the_logits(self.model, config.preprocess.crop)
        self._randomised = Randomised(self.model, layers, seed=config.seed, stages=how.stages or None)
        values = config.preprocess.mean, config.preprocess.std
        self._mean, self._std = (torch.tensor(value, device=device).view(3, 1, 1) for value in values)

    def measure(self, batch: Batch) -> list[Record]:
        records: list[Record] = [{} for _ in batch.rows]
        at_M = [at for at, row in enumerate(batch.rows) if row.status in MAPPED]
        if not at_M or batch.pixels_MHWC is None:
            return records
        rows = [batch.rows[at] for at in at_M]
        slots = [number for number, row in enumerate(filter(seen, batch.rows)) if row.status in MAPPED]
        targets = [row.target for row in rows if row.target is not None]
        found = cascade(
            self.model,
            self._build,
            self._normalised(batch.pixels_MHWC[slots]),
            torch.tensor(targets, device=self.device) if len(targets) == len(rows) else None,
            self._randomised,
            sample_seeds(self.config.seed, [row.key for row in rows]).to(self.device),
        )
        for at, record in zip(at_M, _records(found), strict=True):
            records[at] = record
        return records

    def _normalised(self, pixels_BHWC: Tensor) -> Tensor:
        x_BCHW = pixels_BHWC.to(self.device).permute(0, 3, 1, 2).float()
        return (x_BCHW / 255 - self._mean) / self._std


def _records(found: Cascade) -> list[Record]:
    """Return the values of each image of a batch."""
    layers = [stage.layer for stage in found.stages]
    columns = {
        name: torch.stack([getattr(stage, f"{name}_B") for stage in found.stages], 1).tolist()
        for name in ("spearman", "absolute", "ssim", "entropy", "constant")
    }
    return [
        {"layers": layers, "entropy_before": before, **dict(zip(columns, own, strict=True))}
        for before, *own in zip(found.entropy_B.tolist(), *columns.values(), strict=True)
    ]
