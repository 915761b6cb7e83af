"""Show how the masks of the same images change over a training, on one self-contained HTML page.

The masks of each validation are kept in masks/<step>.npz, as uint8 on the decoder's grid.

Shape suffixes: Y X a thumbnail of the whole upright original, h w the decoder's grid.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.casm.watch.mask_page import named, over_photo
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.shards.samples import Sample
from saltern.pipeline.show.page import Card, Picture, View, render
from saltern.pipeline.show.thumbnails import encode, found_boxes, geometry_in, given_boxes, photograph
from saltern.pipeline.storage.files import write
from saltern.schemas.saliency import OK

COLUMNS = 8  # validations on the page, spread evenly over the training; the first and the last are among them
_NOTE = "Each image, and its mask (white is removed) after the steps below it."

Masks = dict[str, NDArray[np.uint8]]  # mask_hw by the number of the sample on the page; no entry without a mask


def keep_masks(folder: Path, step: int, shown: Sequence[tuple[Sample, Row]]) -> None:
    """Write the masks of one validation."""
    masks = {
        str(number): (row.map() * 255).round().astype(np.uint8)
        for number, (_, row) in enumerate(shown)
        if row.map_bytes is not None
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, **masks)  # type: ignore[arg-type]
    write(folder / f"{step}.npz", packed.getvalue())


def epochs_page(folder: Path, shown: Sequence[tuple[Sample, Row]], names: Mapping[int, str]) -> str:
    """Return the page of all validations whose masks are in the folder.

    Args:
        shown: samples with their rows of the last validation, the same at each.
        names: of classes, by number; it may lack some.
    """
    steps = sorted(int(path.stem) for path in folder.glob("*.npz") if path.stem.isdecimal())
    chosen = {steps[round(place)] for place in np.linspace(0, len(steps) - 1, min(COLUMNS, len(steps)))}
    history = {step: _read(folder / f"{step}.npz") for step in sorted(chosen)}
    cards = [_card(number, sample, row, history, names) for number, (sample, row) in enumerate(shown)]
    facts = {"steps": ", ".join(f"{step:,}" for step in history), "validations": str(len(steps))}
    return render("Masks over the training", facts.items(), [_NOTE], cards)


def _read(path: Path) -> Masks:
    with np.load(path, allow_pickle=False) as masks:
        return dict(masks)


def _card(number: int, sample: Sample, row: Row, history: Mapping[int, Masks], names: Mapping[int, str]) -> Card:
    label = named(row.label, names)
    pictures = list(_pictures(number, sample, row, history, label))
    return Card(row.key, row.shard, OK, [View(pictures, [("class", label)] if label else [], row.error or "")])


def _pictures(number: int, sample: Sample, row: Row, history: Mapping[int, Masks], label: str) -> Iterator[Picture]:
    photo_YX3 = photograph(row, sample)
    if photo_YX3 is None:
        return
    yield encode(photo_YX3, f"{row.key}, {label}", [*given_boxes(sample, row), *found_boxes(row)])
    geometry = geometry_in(row, photo_YX3)
    for step, masks in history.items():
        if geometry is not None and str(number) in masks:
            mask_hw = masks[str(number)].astype(np.float32)
            mask_hw /= 255
            caption = f"step {step:,}: {mask_hw.mean():.2f} removed"
            white_YX3, _ = over_photo(row, mask_hw, geometry, photo_YX3)
            yield encode(white_YX3, f"mask of {row.key} at {caption}", [], caption)
