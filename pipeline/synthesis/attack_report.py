"""What an attack run came to: means over its rows, and a picture of the first samples; from the data files alone."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saltern.pipeline.runs.reader import read_columns
from saltern.pipeline.show.grid import publish_grid
from saltern.pipeline.storage.store import Store
from saltern.schemas.attack import SIDES
from saltern.schemas.run import Run
from saltern.schemas.saliency import OK

SHOWN = 12  # samples of the picture
_MEANS = [f"{side}_{name}" for side in SIDES for name in ("score", "fooled", "norm", "outside")]


def means(store: Store, run: Run) -> dict[str, float]:
    """Means over the rows that are ok, by column, and `images`, their number; empty where there are none."""
    rows = read_columns(store, run, [*_MEANS, "norm_reduction", "status"])
    found = [row for row in rows if row["status"] == OK and row["norm_reduction"] is not None]
    if not found:
        return {}
    made = {name: sum(row[name] for row in found) / len(found) for name in (*_MEANS, "norm_reduction")}
    return {"images": len(found), **made}


def in_words(found: dict[str, float]) -> str:
    """The means in one line."""
    sides = "; ".join(
        f"{side}: fooling confidence {100 * found[f'{side}_score']:.2f} %, fooled "
        f"{100 * found[f'{side}_fooled']:.1f} %, norm {found[f'{side}_norm']:.3f}, outside the map "
        f"{found[f'{side}_outside']:.3f}"
        for side in SIDES
    )
    return f"{found['images']} images; {sides}; norm reduced by {100 * found['norm_reduction']:.1f} %"


def close(store: Store, run: Run, scratch: Path) -> None:
    """The last line, and a picture of the first samples, their perturbations amplified."""
    found = means(store, run)
    if not found:
        return
    print(in_words(found))
    if not run.config.job_options["save_images"]:
        return
    names = ["status", "key", "predicted", "score", "target", "image", "map"]
    names += [f"{side}_{name}" for side in SIDES for name in ("image", "score", "norm")]
    rows = [row for row in read_columns(store, run, names, SHOWN) if row["status"] == OK]
    amplify = 0.5 / run.config.job_options["epsilon"]
    cells = [cell for row in rows for cell in _strip(row, run.class_names, amplify)]
    if cells:
        publish_grid(store, scratch, "attack.png", cells, columns=5)


def _strip(row: dict[str, Any], names: list[str] | None, amplify: float) -> list[tuple[str, Image.Image]]:
    """Clean image, map, both perturbations, the guided image, each with its caption."""
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
