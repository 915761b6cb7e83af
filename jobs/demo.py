"""saltern demo: run the commands on photographs from installable packages."""

import contextlib
import filecmp
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import typer

from saltern.jobs.options import OutFolder
from saltern.pipeline.naming import install_hint
from saltern.schemas.errors import ShardError, UserError

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
    originals = _originals()
    _check_own(photographs, shards, originals)
    for path in shards.glob("*"):
        path.unlink()
    photographs.mkdir(parents=True, exist_ok=True)
    for name, original in originals.items():
        shutil.copyfile(original, photographs / name)
    _saltern("pack", photographs, "--out", shards, "--per-shard", "4", "--no-shuffle")
    _saltern(
        *("extract", shards, "--out", run, "--model", "efficientnet_lite0", "--method", "grad-cam"),
        *("--target", "top1", "--overwrite"),
    )
    _saltern("verify", run)
    _saltern("show", run, "--out", page)
    _print_findings(run)
    typer.echo(f"\nThe dataset is {run}/data/*.parquet; the pictures are in {page}")


def _originals() -> dict[str, Path]:
    """Return the photographs' files by name. Raises UserError if a package is not installed."""
    from importlib.util import find_spec

    found = {}
    for place, names in PHOTOGRAPHS.items():
        package, _, within = place.partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the demo's photographs come with {package}: {install_hint('demo')}")
        found |= {name: Path(spec.origin).parent / within / name for name in names}
    return found


def _check_own(photographs: Path, shards: Path, originals: Mapping[str, Path]) -> None:
    """Check that the folders hold nothing but files of an earlier demo. Raises UserError if they do."""
    from saltern.pipeline.shards.expand import expand
    from saltern.pipeline.shards.samples import list_keys

    def own(path: Path) -> bool:
        if path.parent == photographs:
            return path.name in originals and filecmp.cmp(path, originals[path.name], shallow=False)
        keys = {Path(name).stem for name in originals}
        return path.suffix == ".tar" and set(list_keys(expand([str(path)])[0][0])) <= keys

    for path in (*sorted(photographs.glob("*")), *sorted(shards.glob("*"))):
        with contextlib.suppress(OSError, ShardError):
            if own(path):
                continue
        raise UserError(f"{path} is no file of an earlier demo: move it away, or give another --out")


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
