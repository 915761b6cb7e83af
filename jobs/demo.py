"""saltern demo: run the commands on photographs from installable packages."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from saltern.jobs.options import OutFolder
from saltern.pipeline.naming import install_hint
from saltern.schemas.errors import UserError

# Files of scikit-image and scikit-learn, by the folder that holds them; their documentation describes each one.
PHOTOGRAPHS = {
    "skimage/data": [
        *("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "astronaut.png", "camera.png"),
    ],
    "sklearn/datasets/images": ["flower.jpg", "china.jpg"],
}


def demo(out: OutFolder = Path("demo-out")) -> None:
    """Pack photographs, run Grad-CAM with a pretrained network, verify the run, and show it.

    Replaces the results of an earlier demo. Needs the extra `demo`.
    """
    photographs, shards, run, page = out / "photographs", out / "shards", out / "run", out / "show.html"
    shutil.rmtree(shards, ignore_errors=True)
    _gather(photographs)
    _saltern("pack", photographs, "--out", shards, "--per-shard", "4", "--no-shuffle")
    _saltern(
        *("extract", shards, "--out", run, "--model", "efficientnet_lite0", "--method", "grad-cam"),
        *("--target", "top1", "--overwrite"),
    )
    _saltern("verify", run)
    _saltern("show", run, "--out", page)
    _print_findings(run)
    typer.echo(f"\nThe dataset is {run}/data/*.parquet; the pictures are in {page}")


def _gather(folder: Path) -> None:
    """Copy the photographs into `folder`. Raises UserError if a package is not installed."""
    from importlib.util import find_spec

    folder.mkdir(parents=True, exist_ok=True)
    for place, names in PHOTOGRAPHS.items():
        package, _, within = place.partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the demo's photographs come with {package}: {install_hint('demo')}")
        for name in names:
            shutil.copyfile(Path(spec.origin).parent / within / name, folder / name)


def _saltern(*words: str | Path) -> None:
    """Print a command and run it in a process. A failure ends the demo."""
    line = [str(word) for word in words]
    typer.echo(f"\n$ saltern {shlex.join(line)}")
    ended = subprocess.run([sys.executable, "-m", "saltern", *line], check=False)
    if ended.returncode:
        raise typer.Exit(ended.returncode)


def _print_findings(path: Path) -> None:
    """Print each image's class, box and mask area."""
    from saltern.pipeline.runs.reader import open_run

    run = open_run(str(path))
    typer.echo("\nWhat Grad-CAM found:")
    for row in run:
        if row.status != "ok":
            typer.echo(f"  {row.key}: {row.status}")
            continue
        x0, y0, x1, y1 = row.boxes[0]
        typer.echo(
            f"  {row.key:<16}{run.run.class_names[row.predicted]} ({row.score:.0%}), seen in x {x0}..{x1}, "
            f"y {y0}..{y1} of {row.image_width} x {row.image_height}; the mask covers {row.mask_area:.0%} of the input"
        )
