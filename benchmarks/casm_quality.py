"""Train CASM under several seeds, and print the quality of its masks as mean and standard deviation.

    python benchmarks/casm_quality.py 'tiny-imagenet/train-*.tar' --choose tiny-imagenet/val-000009.tar \\
        --report 'tiny-imagenet/val-00000[0-3].tar' --thinning L100,F --seeds 0,1,2 \\
        --out quality --figures quality/figures

Trains by deploy/casm-tiny-imagenet.toml. The rule of the boxes is chosen on the images of --choose, by the mean LE of
all seeds, and all figures are those of --report. A repeated command continues what it had begun. Trainings and methods
that have a file in --figures are not repeated, so that several machines can share the work: benchmarks/casm-quality
has the files of the table in docs/casm.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from saltern.pipeline.tables import markdown_table

RECIPE = Path(__file__).parent.parent / "deploy/casm-tiny-imagenet.toml"
RULES = ("mean:1", "quantile:0.5", "quantile:0.6", "quantile:0.7")
METRICS = ("le", "om", "f1")
MODEL = ("--model", "efficientnet_lite0", "--target", "top1", "--resize", "160", "--crop", "160")
PEERS = ("cam", "grad-cam")
Figures = dict[str, float]  # of each metric, in percent


def main() -> None:
    """Train what is missing, judge all masks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--choose", nargs="+", required=True, help="shards with boxes on which the rule is chosen")
    parser.add_argument("--report", nargs="+", required=True, help="shards with boxes that are reported on")
    parser.add_argument("--thinning", default="L100", help="names, with commas")
    parser.add_argument("--score", default="classification", help="names, with commas")
    parser.add_argument("--seeds", default="0", help="numbers, with commas")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--figures", type=Path, required=True, help="folder of the figures, a file for each training")
    given = parser.parse_args()
    judged: dict[str, list[dict[str, Any]]] = {}
    for thinning in given.thinning.split(","):
        for score in given.score.split(","):
            own = [casm(given, thinning, score, int(seed)) for seed in given.seeds.split(",")]
            judged[f"casm, {thinning}, {score}"] = own
    judged |= {name: [peer(given, name)] for name in PEERS}
    print(table(judged))


def kept(given: argparse.Namespace, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures in a file, which is made if it is missing."""
    file: Path = given.figures / f"{name}.json"
    if not file.exists():
        text = json.dumps(make(), indent=1) + "\n"
        given.figures.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def casm(given: argparse.Namespace, thinning: str, score: str, seed: int) -> dict[str, Any]:
    """Return the figures of a training."""

    def make() -> dict[str, Any]:
        folder = train(given, thinning, score, seed)
        return judge(given, folder, checkpoint=folder)

    return kept(given, f"{thinning}-{score}-s{seed}", make)


def peer(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the figures of a method without a training."""
    return kept(given, name, lambda: judge(given, given.out / name, method=name))


def train(given: argparse.Namespace, thinning: str, score: str, seed: int) -> Path:
    """Return the folder of a finished training."""
    folder: Path = given.out / f"{thinning}-{score}-s{seed}"
    resume = ["--resume"] if any(folder.glob("checkpoints/*")) else []
    options = ["--thinning", thinning, "--score", score, "--seed", str(seed), "--epochs", str(given.epochs)]
    saltern("train-casm", *given.shards, "--config", RECIPE, "--out", folder, "--device", "cpu", *options, *resume)
    return folder


def judge(
    given: argparse.Namespace, folder: Path, *, method: str = "casm", checkpoint: Path | None = None
) -> dict[str, Any]:
    """Return the figures of a method's masks under each rule: {rule: {"choose": figures, "report": figures}}."""
    found: dict[str, Any] = {}
    for rule in RULES:
        run = folder / "val" / rule.replace(":", "-")
        trained = ["--checkpoint", checkpoint] if checkpoint else []
        shards = [*given.choose, *given.report]
        saltern("extract", *shards, "--out", run, *MODEL, "--method", method, "--discretize", rule,
                "--device", "cpu", *trained)  # fmt: skip
        found[rule] = {part: figures(run, getattr(given, part)) for part in ("choose", "report")}
    return found


def figures(run: Path, shards: list[str]) -> dict[str, Figures]:
    """Return the figures of the run and of the controls on these shards."""
    said = json.loads(saltern("evaluate", run, "--shards", *shards, "--metric", ",".join(METRICS), "--format", "json"))
    lines = {"run": said["runs"][0]["metrics"], **said["controls"]}
    return {name: {key: 100 * line[key]["value"] for key in METRICS if key in line} for name, line in lines.items()}


def table(judged: dict[str, list[dict[str, Any]]]) -> str:
    """Return a row for each group under the rule that is best on the images of --choose, and for each control."""
    rows = []
    for name, group in judged.items():
        rule = min(RULES, key=lambda one: mean(found[one]["choose"]["run"]["le"] for found in group))
        rows.append([name, rule, str(len(group)), *spread([found[rule]["report"]["run"] for found in group])])
    controls = next(iter(judged.values()))[0][RULES[0]]["report"]
    rows += [[name, "-", "-", *spread([found])] for name, found in controls.items() if name != "run"]
    return markdown_table(["", "boxes by", "seeds", *(f"{key} %" for key in METRICS)], rows)


def spread(group: list[Figures]) -> list[str]:
    """Return mean and standard deviation of each metric."""
    cells = []
    for key in METRICS:
        values = [found[key] for found in group if key in found]
        deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.1f}{deviation}" if values else "-")
    return cells


def saltern(*arguments: object) -> str:
    """Run a command of Saltern and return what it printed."""
    command = [sys.executable, "-m", "saltern", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return done.stdout


if __name__ == "__main__":
    main()
