"""Train CASM under several seeds, and print the quality of its masks as mean and standard deviation.

    python benchmarks/casm_quality.py 'tiny-imagenet/train-*.tar' --choose tiny-imagenet/val-000009.tar \\
        --report 'tiny-imagenet/val-00000[0-3].tar' --thinning L100,F --seeds 0,1,2 \\
        --out quality --figures quality/figures

Trains by deploy/casm-tiny-imagenet.toml. The rule of the boxes is chosen on the images of --choose, by the mean LE of
all seeds, and all figures are those of --report. A repeated command continues what it had begun. Trainings and methods
that have a file in --figures (of the same --choose and --report) are not repeated, so that several machines can share
the work: benchmarks/casm-quality has the files of the table in docs/casm.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

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
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--figures", type=Path, required=True, help="folder of the figures, a file for each training")
    given = parser.parse_args()
    length = ["--epochs", str(given.epochs), "--batch-size", str(given.batch_size)]
    rows = []
    for thinning in given.thinning.split(","):
        for score in given.score.split(","):
            how = ["--thinning", thinning, "--score", score, *length]
            name = f"{thinning}-{score}-{given.epochs}-epochs-of-{given.batch_size}"
            seeds = given.seeds.split(",")
            group = [Judge(given, f"{name}-s{seed}", [*how, "--seed", seed]) for seed in seeds]
            rows.append(row(f"casm, {thinning}, {score}", group))
    peers = [Judge(given, name) for name in PEERS]
    rows += [row(judge.name, [judge]) for judge in peers]
    controls = peers[0].figures(RULES[0], "report")
    rows += [[name, "-", "-", *spread([found])] for name, found in controls.items() if name != "run"]
    print(markdown_table(["", "boxes by", "seeds", *(f"{key} %" for key in METRICS)], rows))


class Judge:
    """Measures the masks of a training, or of the method of that name, once: the figures are kept in a file."""

    def __init__(self, given: argparse.Namespace, name: str, training: Sequence[str] = ()):
        self.name, self._given, self._folder, self._training = name, given, given.out / name, training

    def figures(self, rule: str, part: str) -> dict[str, Figures]:
        """Return the figures of the masks, and of the controls if nothing is trained, on one part of the images."""
        file: Path = self._given.figures / f"{self.name}.json"
        known: dict[str, dict[str, dict[str, Figures]]] = json.loads(file.read_text()) if file.exists() else {}
        if part not in known.setdefault(rule, {}):
            known[rule][part] = self._measure(rule, getattr(self._given, part), part)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known, indent=1) + "\n")
        return known[rule][part]

    def _measure(self, rule: str, shards: list[str], part: str) -> dict[str, Figures]:
        method = ["--method", "casm", "--checkpoint", self._checkpoint] if self._training else ["--method", self.name]
        run = self._folder / part / rule.replace(":", "-")
        saltern("extract", *shards, "--out", run, *MODEL, *method, "--discretize", rule, "--device", "cpu")
        said = json.loads(saltern("evaluate", run, "--metric", ",".join(METRICS), "--format", "json"))
        lines = {"run": said["runs"][0]["metrics"], **({} if self._training else said["controls"])}
        return {name: {key: 100 * line[key]["value"] for key in METRICS if key in line} for name, line in lines.items()}

    @cached_property
    def _checkpoint(self) -> Path:
        """The folder of the training, which is done first."""
        resume = ["--resume"] if any(self._folder.glob("checkpoints/*")) else []
        options = ["--config", RECIPE, "--out", self._folder, "--device", "cpu", *self._training, *resume]
        saltern("train-casm", *self._given.shards, *options)
        return self._folder


def row(name: str, group: list[Judge]) -> list[str]:
    """Return the line of a group under the rule that is best on the images of --choose."""
    rule = min(RULES, key=lambda one: mean(judge.figures(one, "choose")["run"]["le"] for judge in group))
    return [name, rule, str(len(group)), *spread([judge.figures(rule, "report")["run"] for judge in group])]


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
