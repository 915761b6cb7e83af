"""The families that need no boxes: statistics of maps, and what the network says to images that a map has changed.

Shape suffixes: N samples of a batch, M measured ones, B the same, H W the network's input, C channels.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from saltern.pipeline.device import memory_format
from saltern.pipeline.extract.explain import AUTOCAST
from saltern.pipeline.extract.extraction import load_model
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.metrics.faithfulness.confidence import average_drop, densities, marked_probability
from saltern.pipeline.metrics.faithfulness.curves import deletion, insertion
from saltern.pipeline.metrics.faithfulness.passes import NORMALISED, black_level, target_probability
from saltern.pipeline.metrics.faithfulness.statistics import map_statistics, mask_share
from saltern.pipeline.metrics.family import Batch, Better, Family, Metric
from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row
from saltern.schemas.config import EvaluateConfig, ExtractConfig
from saltern.schemas.errors import UserError


class MapFamily(Family):
    """Base of the families that measure maps at the network's input. A row without a map has no values."""

    @classmethod
    def check(cls, path: str, config: ExtractConfig) -> None:
        if not config.save_map:
            raise UserError(f"{path} stores no maps (--no-map), and {cls.name} needs them")

    def measure(self, batch: Batch) -> list[Record]:
        records: list[Record] = [{} for _ in batch.rows]
        at_M = [at for at, row in enumerate(batch.rows) if row.map_bytes is not None]
        if not at_M:
            return records
        rows = [batch.rows[at] for at in at_M]
        map_MHW = torch.stack([input_map(row) for row in rows]).to(self.device)
        values = self.measure_maps(rows, map_MHW, self._pixels(batch, at_M))
        columns = {name: value.float().cpu().tolist() for name, value in values.items()}
        for slot, at in enumerate(at_M):
            records[at] = {name: None if math.isnan(column[slot]) else column[slot] for name, column in columns.items()}
        return records

    def _pixels(self, batch: Batch, at_M: list[int]) -> Tensor | None:
        """Return the images of the rows at these positions."""
        if batch.pixels_MHWC is None:
            return None
        decoded = [at for at, row in enumerate(batch.rows) if row.geometry is not None]
        slot = {at: number for number, at in enumerate(decoded)}
        return batch.pixels_MHWC[[slot[at] for at in at_M]]

    @abstractmethod
    def measure_maps(self, rows: list[Row], map_MHW: Tensor, pixels_MHWC: Tensor | None) -> dict[str, Tensor]:
        """Return one value a row, by column."""


def input_map(row: Row) -> Tensor:
    """Return the row's map at the network's input, float32."""
    return upsample(torch.from_numpy(row.map())[None], row.layout.input_shape)[0]


class StatisticsFamily(MapFamily):
    """What a map looks like: blurring alone raises ROAD, and many metrics barely tell a method from noise."""

    name = "statistics"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "total_variation": Metric("TV", Better.NEITHER, "total variation of the scaled map, over its pixels", False),
        "entropy": Metric("entropy, bits", Better.NEITHER, "of the map's values in 256 bins", False),
        "map_mean": Metric("mean", Better.NEITHER, "of the map, scaled to [0, 1]", False),
        "map_std": Metric("std", Better.NEITHER, "of the scaled map, over its pixels", False),
        "mask_area": Metric("mask %", Better.NEITHER, "share of the image in the mask"),
    }

    def measure_maps(self, rows: list[Row], map_MHW: Tensor, pixels_MHWC: Tensor | None) -> dict[str, Tensor]:
        found = map_statistics(map_MHW)
        mask_MHW = torch.stack([torch.from_numpy(row.mask()) for row in rows])
        return {
            "total_variation": found.total_variation_B,
            "entropy": found.entropy_B,
            "map_mean": found.mean_B,
            "map_std": found.std_B,
            "mask_area": mask_share(mask_MHW),
        }


class NetworkFamily(MapFamily):
    """Base of the families that pass changed images through the run's network."""

    needs_pixels = runs_network = True

    def __init__(self, config: ExtractConfig, how: EvaluateConfig, device: torch.device):
        super().__init__(config, how, device)
        self._precision, self.batch = how.precision, how.batch_size
        self._model = load_model(config, device).eval()
        mean, std = config.preprocess.mean, config.preprocess.std
        self._mean, self._std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (mean, std))
        self._black_C11 = black_level(mean, std, NORMALISED, device)

    def measure_maps(self, rows: list[Row], map_MHW: Tensor, pixels_MHWC: Tensor | None) -> dict[str, Tensor]:
        assert pixels_MHWC is not None  # noqa: S101 - the family needs pixels
        layout = memory_format(self._precision, self.device)
        x_BCHW = pixels_MHWC.to(self.device).permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        x_BCHW = x_BCHW.div_(255).sub_(self._mean).div_(self._std)
        # A class-agnostic map is judged by the network's own choice.
        classes = [row.predicted if row.target is None else row.target for row in rows]
        target_B = torch.tensor(classes, device=self.device)
        half = self._precision in AUTOCAST
        with (
            torch.no_grad(),
            frozen(self._model),
            torch.autocast(self.device.type, AUTOCAST.get(self._precision), half),
        ):
            return self.measure_images(x_BCHW, map_MHW, target_B)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        return logits_of(self._model(x_BCHW))

    @abstractmethod
    def measure_images(self, x_BCHW: Tensor, map_BHW: Tensor, target_B: Tensor) -> dict[str, Tensor]:
        """Return one value a sample, by column."""


class PerturbationFamily(NetworkFamily):
    """Areas under the probability of the class while pixels are inserted or deleted in the order of the map."""

    name = "perturbation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "insertion": Metric("insertion", Better.MORE, "area while pixels replace a blurred image, 50 steps", False),
        "deletion": Metric("deletion", Better.LESS, "area while the mean colour replaces pixels, 50 steps", False),
    }

    def measure_images(self, x_BCHW: Tensor, map_BHW: Tensor, target_B: Tensor) -> dict[str, Tensor]:
        whole_B = target_probability(self.logits, x_BCHW, target_B, batch=self.batch)
        inputs = self.logits, x_BCHW, map_BHW, target_B
        return {
            "insertion": insertion(*inputs, batch=self.batch, whole_B=whole_B).area_B,
            "deletion": deletion(*inputs, batch=self.batch, whole_B=whole_B).area_B,
        }


class ConfidenceFamily(NetworkFamily):
    """The probability of the class on the image that is multiplied by its map."""

    name = "confidence"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "average_drop": Metric("average drop %", Better.LESS, "max(0, p(x) - p(m x)) / p(x)"),
        "increase": Metric("increase %", Better.MORE, "share of images with p(m x) > p(x)"),
        "rho_plus": Metric("ρ+", Better.MORE, "positive map density: p(m x) / mean(m)", False),
        "rho_minus": Metric("ρ-", Better.LESS, "negative map density: p((1 - m) x) / mean(1 - m)", False),
    }

    def measure_images(self, x_BCHW: Tensor, map_BHW: Tensor, target_B: Tensor) -> dict[str, Tensor]:
        inputs = self.logits, x_BCHW, map_BHW, target_B, self._black_C11
        marked_B = marked_probability(*inputs, batch=self.batch)
        change = average_drop(*inputs, batch=self.batch, marked_B=marked_B)
        density = densities(*inputs, batch=self.batch, marked_B=marked_B)
        return {
            "average_drop": change.drop_B,
            "increase": change.increase_B,
            "rho_plus": density.positive_B,
            "rho_minus": density.negative_B,
        }
