"""Adversarial sanity: whether maps cover the pixels that a small attack changes most.

Shape suffixes: B batch, H W the network's input, N pixels.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saltern.pipeline.metrics.sanity.similarity import spearman
from saltern.pipeline.metrics.sanity.verdict import Figure
from saltern.pipeline.runs.reader import read_columns
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import AttackConfig
from saltern.schemas.errors import UserError
from saltern.schemas.run import Run
from saltern.schemas.saliency import OK

SHARE = 0.1  # of the pixels, that count as changed most and as salient most
_AT_ONCE = 64  # images


class Overlap(NamedTuple):
    """How a map and the change of an attack agree."""

    overlap_B: Tensor  # share of the most changed pixels that are among the most salient, in [0, 1]; by chance SHARE
    spearman_B: Tensor  # rank correlation of map and change over all pixels; by chance 0


def overlap(map_BHW: Tensor, change_BHW: Tensor, share: float = SHARE) -> Overlap:
    """Compare maps with the change of each pixel by an attack, which the map must not have guided.

    Of pixels that share the value at the border of the `share`, each counts by the part of them that belongs to it.

    Args:
        map_BHW: any unit.
        change_BHW: size of the change, as the sum of |p| over channels.
        share: of the pixels, in (0, 1].
    """
    within_BN, changed_BN = (_top(values.flatten(1), share) for values in (map_BHW, change_BHW))
    return Overlap((within_BN * changed_BN).sum(1) / changed_BN.sum(1), spearman(map_BHW, change_BHW))


def _top(values_BN: Tensor, share: float) -> Tensor:
    """Return how far each pixel belongs to the highest ones, in [0, 1]; the sum is the number of these."""
    number = max(1, round(share * values_BN.shape[1]))
    border_B1 = values_BN.topk(number, 1).values[:, -1:]
    above_BN, equal_BN = (values_BN > border_B1).double(), (values_BN == border_B1).double()
    return above_BN + equal_BN * (number - above_BN.sum(1, keepdim=True)) / equal_BN.sum(1, keepdim=True)


@dataclass(frozen=True)
class Adversarial:
    """The figures of an attack run."""

    images: int
    overlap: Figure
    spearman: Figure

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "images": self.images,
            "share": SHARE,
            "overlap": self.overlap.to_json(),
            "overlap_by_chance": SHARE,
            "spearman": self.spearman.to_json(),
        }

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        return [
            f"{self.images} images: of the {100 * SHARE:.0f} % of the pixels that the plain attack changes most, a "
            f"share of {self.overlap} is among the most salient {100 * SHARE:.0f} % (by chance {SHARE})",
            f"rank correlation of the map and the change of a pixel: {self.spearman} (by chance 0)",
        ]


def judge_attacks(store: Store, run: Run, images: int | None = None) -> Adversarial:
    """Compare the maps of an attack run with its plain attack, which knows no map, from the pictures in its rows.

    Args:
        images: use the first so many rows that are ok; None: all.

    Raises:
        UserError: the run stores no images, or no row is ok.
    """
    if not run.config_of(AttackConfig).save_images:
        raise UserError(f"{store.path} was made with --no-images, and holds no pictures to compare")
    usable = islice(_rows(store, run), images)
    parts = []
    while rows := list(islice(usable, _AT_ONCE)):
        parts.append(overlap(*_pixels(rows)))
    if not parts:
        raise UserError(f"{store.path} has no row that is ok; `saltern status {store.path}` says why")
    shares, correlations = (
        np.concatenate([getattr(part, name).numpy() for part in parts]) for name in ("overlap_B", "spearman_B")
    )
    return Adversarial(len(shares), Figure.of(shares), Figure.of(correlations))


def _rows(store: Store, run: Run) -> Iterator[dict[str, Any]]:
    rows = read_columns(store, run, ["status", "image", "map", "plain_image"])
    return (row for row in rows if row["status"] == OK)


def _pixels(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return maps and changes of rows, in levels of 8 bits."""

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(row[name]))) for row in rows]))

    change_BHW = (stacked("plain_image").int() - stacked("image").int()).abs().sum(-1)
    return stacked("map"), change_BHW
