"""saltern demo: the whole way as a user goes it, on photographs that come inside installable packages."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from saltern.pipeline.naming import install_hint
from saltern.schemas.errors import UserError

# Of scikit-image and scikit-learn, which carry these files; what each is stands in their own documentation.
PHOTOGRAPHS = {
    "skimage": ["chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "astronaut.png", "camera.png"],
    "sklearn": ["flower.jpg", "china.jpg"],
}
_FOLDERS = {"skimage": ("skimage", "data"), "sklearn": ("sklearn", "datasets", "images")}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what is made; an earlier demo's is replaced.")] = Path(
        "demo-out"
    ),
) -> None:
    """Pack real photographs, run Grad-CAM with a pretrained network, verify, show. Needs the extra `demo`."""
    photographs, shards, run, page = out / "photographs", out / "shards", out / "run", out / "show.html"
    shutil.rmtree(shards, ignore_errors=True)
    _gather(photographs)
    _saltern("pack", photographs, "--out", shards, "--per-shard", "4")
    _saltern(
        *("extract", shards, "--out", run, "--model", "efficientnet_lite0", "--method", "grad-cam"),
        *("--target", "top1", "--overwrite"),
    )
    _saltern("verify", run)
    _saltern("show", run, "--out", page)
    _tell(run)
    typer.echo(f"\nThe dataset is {run}/data/*.parquet; the pictures are in {page}")


def _gather(folder: Path) -> None:
    from importlib.util import find_spec

    folder.mkdir(parents=True, exist_ok=True)
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the demo's photographs come with {package}: {install_hint('demo')}")
        source = Path(spec.origin).parent.joinpath(*_FOLDERS[package][1:])
        for name in names:
            shutil.copyfile(source / name, folder / name)


def _saltern(*words: str | Path) -> None:
    """Run a command as a user would, and show it."""
    line = [str(word) for word in words]
    typer.echo(f"\n$ saltern {shlex.join(line)}")
    ended = subprocess.run([sys.executable, "-m", "saltern", *line], check=False)
    if ended.returncode:
        raise typer.Exit(ended.returncode)


def _tell(run: Path) -> None:
    """What was found, in words."""
    import json

    import pyarrow.dataset as ds

    names = json.loads((run / "run.json").read_text())["class_names"]
    columns = ["key", "predicted", "score", "boxes", "mask_area", "status", "image_width", "image_height"]
    typer.echo("\nWhat Grad-CAM found:")
    for row in ds.dataset(run / "data").to_table(columns=columns).to_pylist():
        if row["status"] != "ok":
            typer.echo(f"  {row['key']}: {row['status']}")
            continue
        x0, y0, x1, y1 = row["boxes"][0]
        typer.echo(
            f"  {row['key']:<16}{names[row['predicted']]} ({row['score']:.0%}), seen in x {x0}..{x1}, y {y0}..{y1} of "
            f"{row['image_width']} x {row['image_height']}; the mask covers {row['mask_area']:.0%} of the input"
        )
