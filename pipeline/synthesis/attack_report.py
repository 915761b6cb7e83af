"""The report of an attack run, from its data files: means over its rows, and a picture of the first samples."""

import io
from typing import Any

import numpy as np
from PIL import Image

from saltern.pipeline.runs.reader import read_columns
from saltern.pipeline.show.grid import publish_grid
from saltern.pipeline.storage.store import Store
from saltern.schemas.attack import SIDES
from saltern.schemas.config import AttackConfig
from saltern.schemas.run import Run
from saltern.schemas.saliency import OK

SHOWN = 12  # samples of the picture
_MEANS = [f"{side}_{name}" for side in SIDES for name in ("score", "fooled", "norm", "outside")]


def close(store: Store, run: Run) -> None:
    """Print the means, and publish a picture of the first samples with amplified perturbations."""
    averages = means(store, run)
    if not averages:
        return
    print(in_words(averages))
    config = run.config_of(AttackConfig)
    if not config.save_images:
        return
    names = ["status", "key", "predicted", "score", "target", "image", "map"]
    names += [f"{side}_{name}" for side in SIDES for name in ("image", "score", "norm")]
    rows = [row for row in read_columns(store, run, names, SHOWN) if row["status"] == OK]
    amplify = 0.5 / config.pgd.epsilon
    cells = [cell for row in rows for cell in _strip(row, run.class_names, amplify)]
    if cells:
        publish_grid(store, "attack.png", cells, columns=5)


def means(store: Store, run: Run) -> dict[str, float]:
    """Return means over the rows that are ok, by column, and `images`, their number; empty if no row is ok."""
    names = (*_MEANS, "norm_reduction")
    images, sums = 0, np.zeros(len(names))
    for row in read_columns(store, run, [*names, "status"]):
        if row["status"] == OK and row["norm_reduction"] is not None:
            images += 1
            sums += [row[name] for name in names]
    return {"images": images, **dict(zip(names, (sums / images).tolist(), strict=True))} if images else {}


def in_words(averages: dict[str, float]) -> str:
    """Return the means as one line."""
    sides = "; ".join(
        f"{side}: fooling confidence {100 * averages[f'{side}_score']:.2f} %, fooled "
        f"{100 * averages[f'{side}_fooled']:.1f} %, norm {averages[f'{side}_norm']:.3f}, outside the map "
        f"{averages[f'{side}_outside']:.3f}"
        for side in SIDES
    )
    return f"{averages['images']} images; {sides}; norm reduced by {100 * averages['norm_reduction']:.1f} %"


def _strip(row: dict[str, Any], names: list[str] | None, amplify: float) -> list[tuple[str, Image.Image]]:
    """Return the clean image, the map, both perturbations and the guided image, each with its caption."""
    image, map_, plain, guided = (
        Image.open(io.BytesIO(row[name])) for name in ("image", "map", "plain_image", "guided_image")
    )

    def named(label: int) -> str:
        return names[label] if names else f"class {label}"

    def noise(attacked: Image.Image) -> Image.Image:
        p = np.asarray(attacked).astype(np.float32) - np.asarray(image)
        return Image.fromarray((127.5 + amplify * p).clip(0, 255).round().astype(np.uint8))

    return [
        (f"{100 * row['score']:.1f} % {named(row['predicted'])}", image),
        ("map of that class", map_),
        (f"plain p x {amplify:.3g}, norm {row['plain_norm']:.2f}", noise(plain)),
        (f"guided p x {amplify:.3g}, norm {row['guided_norm']:.2f}", noise(guided)),
        (f"guided: {100 * row['guided_score']:.2f} % {named(row['target'])}", guided),
    ]
