"""Show sample masks of a training on one self-contained HTML page.

Shape suffixes: Y X a thumbnail of the whole upright original.
"""

import hashlib
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.metrics.judge import AS_IS, scores
from saltern.pipeline.metrics.localization.boxes import iou
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.annotations import extra, read_annotation
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.show.page import Card, Number, Picture, View, render
from saltern.pipeline.show.thumbnails import encode, found_boxes, geometry_in, given_boxes, photograph
from saltern.schemas.run import Shard
from saltern.schemas.saliency import Box

Pixels = NDArray[np.uint8]
Layers = tuple[Pixels, NDArray[np.floating]]
SHOWN = 24  # samples on a page
_DIM = 0.3  # brightness of what the network did not see

_NOTE = (
    "Each image, its mask (white is removed), and the image that the mask leaves: x * (1 - m), with the mean colour "
    "in place of the removed part. Dark: outside of the network's crop."
)


@dataclass
class Chosen:
    """The samples of a page, which are those with the smallest hashes of their names, and the names of classes."""

    kept: list[tuple[bytes, Shard, Sample]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def offer(self, shard: Shard, sample: Sample) -> None:
        drawn = hashlib.sha256(f"{shard.name}/{sample.index}".encode("utf-8", "surrogateescape")).digest()
        insort(self.kept, (drawn, shard, sample), key=lambda entry: entry[0])
        del self.kept[SHOWN:]
        if sample.label is not None and sample.label not in self.names:
            name = extra(sample).get("name")
            if isinstance(name, str):
                self.names[sample.label] = name

    def samples(self) -> list[tuple[Shard, Sample]]:
        """Return the samples in the order of their names."""
        return sorted(
            ((shard, sample) for _, shard, sample in self.kept), key=lambda pair: (pair[0].name, pair[1].index)
        )


def mask_page(
    line: Mapping[str, float],
    shown: Sequence[tuple[Sample, Row]],
    names: Mapping[int, str],
    mean: Sequence[float],
) -> str:
    """Return the page of one validation.

    Args:
        line: of validation.jsonl.
        shown: samples and their rows.
        names: of classes, by number; it may lack some.
        mean: of RGB in [0, 1], which is 0 in the network's input.
    """
    step = int(line["step"])
    facts = {
        "LE": f"{line['le']:.2f} %",
        "F1": f"{line['f1']:.2f} %",
        "top-1": f"{line['top1']:.2f} %",
        "mean mask": f"{line['mask_mean']:.3f} ± {line['mask_std']:.3f}",
        "samples": f"{line['samples']:,.0f}, {line['with_boxes']:,.0f} with boxes, {line['damaged']:,.0f} damaged",
        "shown": f"{len(shown)}, the same at each validation",
    }
    colour = 255 * np.asarray(mean)
    cards = [_card(sample, row, names, colour) for sample, row in shown]
    return render(f"Masks after {step:,} steps", facts.items(), [_NOTE], cards)


def _card(sample: Sample, row: Row, names: Mapping[int, str], colour: NDArray[np.float64]) -> Card:
    area = float(row.map().mean()) if row.map_bytes is not None else None
    overlap, f1 = _judged(sample, row)
    right = None if row.label is None else row.predicted == row.label
    verdict = "" if right is None else " (right)" if right else " (wrong)"
    facts = {
        "class": named(row.label, names),
        "found": "" if row.predicted is None else named(row.predicted, names) + verdict,
        "mean mask": "" if area is None else f"{area:.2f}",
        "IoU": "" if overlap is None else f"{overlap:.2f} ({'hit' if overlap > 0.5 else 'miss'})",
        "F1": "" if f1 is None else f"{f1:.2f}",
        "size": "" if row.image_width is None else f"{row.image_width} x {row.image_height}",
    }
    values: dict[str, Number] = {"mean mask": area, "IoU": overlap, "F1": f1, "right": right}
    view = View(_pictures(sample, row, facts, colour), [pair for pair in facts.items() if pair[1]], row.error or "")
    return Card(row.key, row.shard, row.status, [view], values)


def _judged(sample: Sample, row: Row) -> tuple[float | None, float | None]:
    """Return the IoU of the found box, and the continuous F1; None if the sample has no boxes."""
    try:
        truth = read_annotation(sample)
    except ValueError:
        truth = None
    if truth is None:
        return None, None
    boxes: list[Box] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in row.boxes or ()]
    return max((iou(box, truth.boxes) for box in boxes), default=0.0), scores(row, truth, AS_IS)["f1"]


def named(number: int | None, names: Mapping[int, str]) -> str:
    return "" if number is None else f"{number} {names.get(number, '')}".strip()


def _pictures(sample: Sample, row: Row, facts: Mapping[str, str], colour: NDArray[np.float64]) -> list[Picture]:
    """Return the photograph with true and found boxes, the mask, and the photograph that the mask leaves."""
    photo_YX3 = photograph(row, sample)
    if photo_YX3 is None:
        return []
    given, found = given_boxes(sample, row), found_boxes(row)
    made = [encode(photo_YX3, f"{row.key}, {facts['class']}", [*given, *found])]
    geometry = geometry_in(row, photo_YX3)
    if row.map_bytes is None or geometry is None:
        return made
    white_YX3, mask_YX1 = over_photo(row, row.map(), geometry, photo_YX3)
    seen_YX1, mask_YX1 = np.isfinite(mask_YX1), np.nan_to_num(mask_YX1)
    left_YX3 = np.where(seen_YX1, photo_YX3 * (1 - mask_YX1) + colour * mask_YX1, _DIM * photo_YX3)
    made.append(encode(white_YX3, f"mask of {row.key}, {facts['mean mask']} of it removed", found))
    made.append(encode(_levels(left_YX3), f"{row.key} with the mask removed", [*given, *found]))
    return made


def over_photo(row: Row, mask_hw: NDArray[np.float32], geometry: list[float], photo_YX3: Pixels) -> Layers:
    """Return a mask as a picture in the photograph's frame, and its values there: mask_YX1, NaN outside the crop."""
    height, width = photo_YX3.shape[:2]
    mask_YX1 = over_frame(mask_hw, row.layout.input_shape, geometry, height, width)[..., None]
    white_YX3 = np.where(np.isfinite(mask_YX1), 255 * np.nan_to_num(mask_YX1), _DIM * photo_YX3)
    return _levels(white_YX3), mask_YX1


def _levels(pixels_YX3: NDArray[np.floating]) -> Pixels:
    return pixels_YX3.round().clip(0, 255).astype(np.uint8)
