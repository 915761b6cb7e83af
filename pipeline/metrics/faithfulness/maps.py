"""The family `statistics`, and the base of all families that measure maps.

Shape suffixes: N samples of a batch, M measured ones, H W the network's input, C channels.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.metrics.faithfulness.statistics import map_statistics, mask_share
from saltern.pipeline.metrics.family import Batch, Family
from saltern.pipeline.runs.columns import Record
from saltern.pipeline.runs.reader import Row
from saltern.schemas.config import ExtractConfig
from saltern.schemas.errors import UserError
from saltern.schemas.metrics import METRICS


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
        values = self.measure_maps(batch.subject, rows, map_MHW, self._pixels(batch, at_M))
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
    def measure_maps(
        self, subject: str, rows: list[Row], map_MHW: Tensor, pixels_MHWC: Tensor | None
    ) -> dict[str, Tensor]:
        """Return one value a row, by column."""


def input_map(row: Row) -> Tensor:
    """Return the row's map at the network's input, float32."""
    return upsample(torch.from_numpy(row.map())[None], row.layout.input_shape)[0]


class StatisticsFamily(MapFamily):
    """What a map looks like: blurring alone raises ROAD, and many metrics barely tell a method from noise."""

    name = "statistics"
    metrics = METRICS["statistics"]

    def measure_maps(
        self, subject: str, rows: list[Row], map_MHW: Tensor, pixels_MHWC: Tensor | None
    ) -> dict[str, Tensor]:
        found = map_statistics(map_MHW)
        mask_MHW = torch.stack([torch.from_numpy(row.mask()) for row in rows])
        return {
            "total_variation": found.total_variation_B,
            "entropy": found.entropy_B,
            "map_mean": found.mean_B,
            "map_std": found.std_B,
            "mask_area": mask_share(mask_MHW),
        }
