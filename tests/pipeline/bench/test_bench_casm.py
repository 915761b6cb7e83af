"""Tests of the bench of CASM: it runs, and reports every figure. No test depends on a figure's value."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.bench import commands, feed, figures
from saltern.pipeline.bench.casm import CasmBench, Kind, Sides, as_table, measure, mix
from saltern.pipeline.bench.commands import TrainingBench, training_gain, training_line
from saltern.pipeline.casm.algorithm.thinning import THINNINGS
from saltern.schemas.errors import UserError

TOY = """
from torch import nn

class Toy(nn.Module):
    image_size = 32

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((3, 4), (4, 4), (4, 6), (6, 6), (6, 8))
        ))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.stages(x).mean((2, 3)))
"""
# Replaces train-casm: logs a speed that depends on the number of workers, and fails for the model `broken`.
TRAINING = """
import json, os, sys
words = sys.argv[1:]
given = dict(zip(words[2::2], words[3::2]))
if given["--model"] == "broken":
    sys.exit("error: it cannot be trained")
assert words[0] == "train-casm" and os.environ["OMP_NUM_THREADS"] == "1"
rate = 10.0 * int(given["--workers"]) ** 0.5 * len(os.sched_getaffinity(0)) ** 0.5
with open(given["--out"] + "/speed.jsonl", "w") as lines:
    for number, factor in enumerate((0.01, 1, 1)):
        print(json.dumps({"step": number, "images_per_s": factor * rate}), file=lines)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bench_toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_toy", raising=False)
    return "bench_toy:Toy"


def test_a_thinning_is_a_mix_of_kinds() -> None:
    assert mix(THINNINGS["F"]) == {Kind(False, False): 1}
    assert mix(THINNINGS["L"]) == {Kind(True, False): 1}
    assert mix(THINNINGS["L100"]) == {Kind(True, False): 0.5, Kind(True, True): 0.5}


def made(kind: Kind, precision: str = "fp32") -> Sides:
    from bench_toy import Toy

    draw = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, 3, 32, 32, generator=draw)
    return Sides(Toy(), kind, precision, x_BCHW, torch.tensor([0, 1]))  # type: ignore[arg-type]


class Counted:
    """Counter of forward and backward passes, by the convolutions of the first stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards, self.backwards = 0, list[int]()
        whole, grad, backward = nn.Conv2d.forward, torch.autograd.grad, torch.autograd.backward

        def forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
            self.forwards += conv.in_channels == 3
            return whole(conv, x)

        def counted(outputs: object, inputs: list[torch.Tensor], *args: object, **options: object) -> object:
            self.backwards.append(len(inputs))
            return grad(outputs, inputs, *args, **options)  # type: ignore[call-overload]

        def counted_in_place(loss: torch.Tensor, *, inputs: list[torch.Tensor], retain_graph: bool) -> None:
            self.backwards.append(len(inputs))
            backward(loss, inputs=inputs, retain_graph=retain_graph)

        monkeypatch.setattr(nn.Conv2d, "forward", forward)
        monkeypatch.setattr(torch.autograd, "grad", counted)
        monkeypatch.setattr(torch.autograd, "backward", counted_in_place)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("kind", [Kind(False, False), Kind(True, False), Kind(True, True)])
def test_the_limit_makes_the_passes_of_the_step(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = made(kind)
    counted = Counted(monkeypatch)
    sides.step()
    assert counted.forwards == 2
    # The step's backward pass to the mask continues through the decoder; the limit has two separate passes.
    assert len(counted.backwards) == 1 + kind.trained + (kind.trained and not kind.past)
    step = sorted(counted.backwards)
    counted.forwards, counted.backwards = 0, []
    sides.limit()
    assert counted.forwards == 2
    assert sorted(counted.backwards) == sorted([*step, 1])


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("past", [False, True])
def test_every_step_is_of_its_kind_and_leaves_the_weights(past: bool) -> None:
    sides = made(Kind(True, past))
    training = sides._training
    before = {name: value.clone() for name, value in training.classifier.named_parameters()}
    first = training.steps_done
    for _ in range(8):
        sides.step()
    assert {training.plan(step).member >= 0 for step in range(first, first + 8)} == {past}
    assert all(torch.equal(value, before[name]) for name, value in training.classifier.named_parameters())


@pytest.mark.slow
def test_the_command_reports_every_figure(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_ENOUGH_S", {"cpu": 0.01})
    monkeypatch.setattr(feed, "_IMAGES", 4)
    words = ["bench", "casm", "--out", str(tmp_path / "out"), "--model", toy, "--batch-size", "2", "--device", "cpu"]
    ended = CliRunner().invoke(app, [*words, "--rounds", "1", "--workers", "1"], catch_exceptions=False)
    assert ended.exit_code == 0
    report = json.loads((tmp_path / "out" / "casm.json").read_text())
    assert {"cpu", "cores", "versions", "date"} <= set(report["machine"])
    assert report["scaling"] is None
    assert [len(rates) for rates in report["feed"]["rounds"].values()] == [1, 1]
    assert report["feed"]["value"] > 0
    assert report["feed"]["goal"] == 0.9
    assert "end to end from shards ÷ the step alone: " in ended.stdout
    rows = [(row["thinnings"], row["precision"]) for row in report["steps"]]
    kinds = ["F"], ["L", "L100"], ["L100"], ["L100"]  # the last is the expected one
    assert rows == [(kind, precision) for kind in kinds for precision in ("fp32", "bf16")]
    for row in report["steps"]:
        for value in (row["over_limit"], *row["ms"].values(), *row["peak_mb"].values()):
            assert math.isfinite(value)
            assert value > 0
    ms = [row["ms"]["step"] for row in report["steps"] if row["precision"] == "fp32"]
    assert ms[3] == pytest.approx((ms[1] + ms[2]) / 2)
    table = (tmp_path / "out" / "casm.md").read_text()
    assert table in ended.stdout
    assert table.count("\n| ") == 2 + len(rows)  # heads and the line below them
    assert "another backward to f's weights" in table


def test_a_thinning_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="unknown thinning 'L10'"):
        next(measure(CasmBench(thinnings=("L10",)), print))


def test_a_miss_is_explained() -> None:
    ms = {"step": 15.0, "limit": 10.0, "optimisers": 2.0}
    entry = {"kind": "k", "thinnings": ["L"], "precision": "fp32", "ms": ms, "over_limit": 1.5, "goal": 1.15}
    table = as_table([{**entry, "limit": "a forward", "peak_mb": {"step": 2.0, "limit": 1.0}}])
    assert "**1.500** (<= 1.15): 2 ms go to the optimisers, 3 to the rest" in table


@pytest.fixture
def trainer(tmp_path: Path) -> list[str]:
    (tmp_path / "training.py").write_text(TRAINING)
    return [sys.executable, str(tmp_path / "training.py")]


def test_scaling_leaves_out_the_first_reading(trainer: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "cores", lambda: 2)
    bench = TrainingBench(trainer, rounds=2, images=4)
    entry = training_gain(bench)
    assert [len(found) for found in entry["rounds"].values()] == [4, 4]
    assert entry["images_per_s"][1] == pytest.approx(10)
    assert entry["gain"] == pytest.approx(entry["images_per_s"][2] / 10)
    assert f"{entry['gain']:.2f} x" in training_line(entry, bench)
    json.dumps(entry)


def test_scaling_says_why_it_is_left_out(trainer: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    many = TrainingBench(trainer, workers=10_000, images=4)
    entry = training_gain(many)
    assert "10000 workers, and " in entry["skipped"]
    assert "skipped, 10000 workers" in training_line(entry, many)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert training_gain(TrainingBench(trainer, device="cuda"))["skipped"] == "2 workers, and 1 GPU"
    monkeypatch.setattr(commands, "cores", lambda: 2)
    broken = TrainingBench(trainer, model="broken", images=4)
    assert "it cannot be trained" in training_gain(broken)["skipped"]
