"""Do the first steps of CASM trainings under several seeds, and print whether their masks stay alive.

    python benchmarks/casm_seeds.py 'tiny-imagenet/train-*.tar' --setting lite0-160 --seeds 8 --out seeds.jsonl

Each seed is one line of the file; seeds that have a line are not repeated. The setting `resnet18-shapes` takes no
shards: it draws coloured shapes, and ResNet-18 starts from random weights.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from saltern.pipeline.casm.algorithm.hyperparameters import PRESETS, Hyperparameters
from saltern.pipeline.casm.algorithm.thinning import thinning_named
from saltern.pipeline.casm.training.plan import TrainRequest, make_plan
from saltern.pipeline.casm.training.trainee import build
from saltern.pipeline.device import arithmetic
from saltern.pipeline.shards.resample import send
from saltern.pipeline.tables import markdown_table
from saltern.pipeline.training.loop import Normalise, batches_of
from saltern.pipeline.training.ranks import Ranks

RECIPE = Path(__file__).parent.parent / "deploy/casm-tiny-imagenet.toml"
SETTINGS: dict[str, dict[str, Any]] = {
    "lite0-160": {"model": "efficientnet_lite0", "side": 160, "batch_size": 16, "mask_area": 0.62, "min_crop": 0.5},
    "lite0-128": {"model": "efficientnet_lite0", "side": 128, "batch_size": 64, "mask_area": 0.5, "min_crop": 0.5},
    "resnet18-shapes": {"model": "resnet18", "weights": "none", "side": 64, "batch_size": 16, "mask_area": 0.5},
}
KEY = ("setting", "thinning", "preset")  # of a row
FIRST, LAST = 200, 400  # the steps over which the mean mask is judged
NEAR, SPREAD = 0.1, 0.05  # of the mean mask to the wanted area, at most; over images, at least


def main() -> None:
    """Measure the seeds that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="*")
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--thinning", default="L100")
    parser.add_argument("--steps", type=int, default=LAST)
    parser.add_argument("--preset", choices=PRESETS, default="steady")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    key = [getattr(given, name) for name in KEY]
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        shards = given.shards or [str(write_shapes(Path(folder) / "shapes.tar"))]
        for seed in range(given.first, given.first + given.seeds):
            if not any([line[name] for name in (*KEY, "seed")] == [*key, seed] for line in done):
                line = measure(given, shards, seed, Path(folder) / str(seed))
                with given.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                done.append(line)
    print(table(done))


def measure(given: argparse.Namespace, shards: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Return what the masks did in a training's first steps."""
    setting = {**SETTINGS[given.setting]}
    area = setting.pop("mask_area")
    if setting["model"] == "efficientnet_lite0":
        setting["classes"] = tomllib.loads(RECIPE.read_text())["classes"]
    how = {**PRESETS[given.preset], "mask_area": area, "seed": seed, "thinning": thinning_named(given.thinning)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    request = TrainRequest(
        shards=shards, out=str(folder), hyperparameters=Hyperparameters(**how), epochs=20, steps_per_epoch=125,
        device=device, decode_threads=1, labels="as-is", **setting,
    )  # fmt: skip
    plan, ranks = make_plan(request, device, None, lambda text: None), Ranks(torch.device(device))
    with arithmetic(threads=plan.config["torch_threads"]):
        training, normalise = build(plan, ranks), Normalise(plan.config, ranks.device)
        logs = [
            training.step(normalise(batch.pixels_BHWC), send(batch.label_B, ranks.device)).floats()
            for batch in batches_of(plan, ranks).run(0, given.steps)
        ]
    judged = logs[FIRST:]
    blocks = [round(mean(log["mask_mean"] for log in logs[at : at + 20]), 3) for at in range(0, len(logs), 20)]
    found = {
        **{name: getattr(given, name) for name in KEY}, "seed": seed, "steps": len(logs), "area": area,
        "mask": mean(log["mask_mean"] for log in judged), "spread": mean(log["mask_std"] for log in judged),
        "right": mean(log["right"] for log in judged), "lambda": logs[-1]["lambda"], "blocks": blocks,
    }  # fmt: skip
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Return a row for each setting: how many seeds are alive, and the range of their measures."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in KEY), []).append(line)
    rows = []
    for key, group in groups.items():
        alive = sum(abs(line["mask"] - line["area"]) <= NEAR and line["spread"] >= SPREAD for line in group)
        ends = [[line[name] for line in group] for name in ("mask", "spread")]
        blocks = [block for line in group for block in line["blocks"][5:]]
        shown = [f"{min(values):.2f} to {max(values):.2f}" for values in (*ends, blocks)]
        rows.append([*key, f"{alive} of {len(group)}", f"{group[0]['area']}", *shown])
    names = ["alive", "wanted mask", f"mean mask, steps {FIRST} on", "spread over images", "means of 20 steps, 100 on"]
    return markdown_table([*KEY, *names], rows)


def write_shapes(path: Path, count: int = 640, side: int = 64) -> Path:
    """Write a shard of coloured shapes on noise: six classes, three forms in two colours."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            label = number % 6
            image = Image.fromarray(draw.integers(60, 120, (side, side, 3), np.uint8))
            size, (x, y) = draw.integers(18, 34), draw.integers(2, 26, 2)
            box, colour = (x, y, x + size, y + size), (230, 60, 40) if label % 2 else (40, 90, 230)
            pen = ImageDraw.Draw(image)
            if label // 2 == 0:
                pen.ellipse(box, fill=colour)
            elif label // 2 == 1:
                pen.rectangle(box, fill=colour)
            else:
                pen.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill=colour)
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            for name, content in ((f"{number:04}.png", encoded.getvalue()), (f"{number:04}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


if __name__ == "__main__":
    main()
