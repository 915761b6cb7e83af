"""Tests of `saltern bench extract`: it runs, and reports every figure. No test depends on a figure's value."""

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call
from making import write_shard, write_shards

from saltern.pipeline.bench import commands, extract, footprint
from saltern.pipeline.bench.commands import RunRate, Used, measure_run, run_command
from saltern.pipeline.bench.extract import engines, measure
from saltern.pipeline.bench.figures import Figure, by_turns, figures_table
from saltern.pipeline.bench.report import Report
from saltern.pipeline.bench.workload import NOOP, ExtractBench, make_images, read_images
from saltern.pipeline.bench.workload import write_shards as write_bench_shards
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import PHASES, Receipt

# Replaces `saltern extract`: writes receipts of two workers that ended at the times given, or fails.
RUN = """
import json, os, sys
out = sys.argv[sys.argv.index("--out") + 1]
os.mkdir(out + "/receipts")
for number, (worker, second) in enumerate(json.loads(sys.argv[1])):
    path = f"{out}/receipts/{number}.json"
    open(path, "w").write(RECEIPTS[worker])
    os.utime(path, (second, second))
"""


def figure(value: float | None, goal: float, at_least: bool) -> Figure:
    return Figure("f", value, goal, "x", at_least, "how", "why")


def test_a_figure_knows_whether_it_meets_its_goal() -> None:
    assert figure(0.96, 0.95, True).verdict() == "met, +1.1%"
    assert figure(0.90, 1.00, True).verdict() == "MISSED, -10.0%"
    assert figure(1.10, 1.00, False).verdict() == "MISSED, -10.0%"
    assert figure(None, 1.00, True).verdict() == "skipped"


def test_sides_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    sides = [lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"]
    assert by_turns(3, *sides) == [[1.0, 4.0, 5.0], [2.0, 3.0, 6.0]]
    assert "".join(calls) == "abbaab"


def test_images_of_the_shards_are_repeated(tmp_path: Path) -> None:
    images = read_images([str(write_shards(tmp_path / "given", 2, 6))], 100)
    assert len(images) == 12
    shards, _ = expand([str(write_bench_shards(tmp_path / "work", images, 3, 5))])
    samples = [list(read_samples(shard)) for shard in shards]
    assert [len(each) for each in samples] == [5, 5, 5]
    assert [sample.image for each in samples for sample in each] == [*images, *images[:3]]
    write_shards(tmp_path / "empty", 1, 0)
    with pytest.raises(UserError, match="no samples"):
        read_images([str(tmp_path / "empty")], 1)


def test_made_pictures_weigh_as_much_as_photographs() -> None:
    images = make_images(6)
    assert len(set(images)) == 6
    assert all(40_000 < len(image) < 250_000 for image in images)


def run_of(tmp_path: Path, ends: list[tuple[str, float]]) -> list[str]:
    """Return a command that leaves a receipt of 10 samples for each (worker, second)."""
    seconds = {**dict.fromkeys(PHASES, 0.5), "total": 1.0}
    receipt = Receipt("s", 1, "f", 10, 10, {"ok": 10}, "0", 1, seconds)
    receipts = {worker: replace(receipt, worker=worker).to_json().decode() for worker, _ in ends}
    (tmp_path / "run.py").write_text(f"RECEIPTS = {receipts!r}\n{RUN}")
    return [sys.executable, str(tmp_path / "run.py"), json.dumps(ends)]


def test_the_rate_of_a_run_leaves_out_starts_and_ends(tmp_path: Path) -> None:
    first = [("a", second) for second in (100, 101, 103, 105, 107, 107.1, 107.2)]
    rate = measure_run(run_of(tmp_path, first))
    assert rate.images_s == pytest.approx(3 * 10 / 6)  # the shards that ended at 103, 105 and 107
    assert rate.thread_ms == dict.fromkeys(PHASES, pytest.approx(50))
    late = [("b", second) for second in (104, 105, 106, 107, 107.1, 107.2)]
    assert measure_run(run_of(tmp_path, first + late)).images_s == pytest.approx(5 + 10)
    with pytest.raises(UserError, match="cannot measure on 4 shards"):
        measure_run(run_of(tmp_path, first[:4]))


def run_here(words: Sequence[str], on_cores: int = 0, torch_threads: int | None = None) -> Used:
    """Replace the process of a measured command, which would start in seconds."""
    since = time.perf_counter()
    ended = call(*words[3:])  # after `python -m saltern`
    assert ended.returncode == 0, ended.stderr
    return Used(time.perf_counter() - since, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def test_a_command_is_measured_and_its_failure_told() -> None:
    used = run_command([sys.executable, "-c", "import time; time.sleep(0.01)"])
    assert used.seconds >= 0.01
    assert 1 < used.peak_mb < 1000
    with pytest.raises(UserError, match=r"cannot measure: `.*` failed: gone"):
        run_command([sys.executable, "-c", "import sys; sys.exit('gone')"])


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    for room in (commands, footprint):
        monkeypatch.setattr(room, "run_command", run_here)
    bench = ExtractBench(
        command=[sys.executable, "-m", "saltern"],
        shards=[str(write_shard(tmp_path / "in" / "a-0.tar", 8))],
        **NOOP,
        batch_size=2,
        rounds=1,
        batches=14,
        large_shards=7,
        few_shards=1,
        many_shards=2,
        done_shards=20,
        loop_shards=20,
    )
    report = Report(tmp_path / "out" / "extract", {"rounds": 1}, "toys")
    table = report.write(report.follow("figures", measure(bench), figures_table))
    made = json.loads((tmp_path / "out" / "extract.json").read_text())
    assert set(made) == {"machine", "settings", "figures"}
    assert {"cpu", "cores", "gpu", "load_average", "versions", "date"} <= set(made["machine"])
    for row in made["figures"]:
        assert math.isfinite(row["value"]), row["name"]
        assert row["value"] > 0, row["name"]
        assert row["verdict"].startswith(("met", "MISSED")), row["name"]
    names = " ".join(row["name"] for row in made["figures"])
    for part in (
        "method alone",
        "decoding alone",
        "stored",
        "memory",
        "resume",
        "driver loop",
        "--help",
        "2 actors",
        "one command",
    ):
        assert part in names
    assert (tmp_path / "out" / "extract.md").read_text() == table
    assert table.count("\n| ") == 2 + len(made["figures"])  # heads and the line below them


def test_on_a_gpu_a_run_is_held_to_the_slower_of_method_and_decoding_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    run = RunRate(8100.0, dict.fromkeys(PHASES, 0.1))
    monkeypatch.setattr(extract, "measure_run", lambda words: asked.append(tuple(words)) or run)
    monkeypatch.setattr(extract, "method_alone", lambda bench, threads: 10_000.0)
    monkeypatch.setattr(extract, "decode_alone", lambda *how: asked.append(how[1:]) or 9000.0)
    monkeypatch.setattr(extract.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    image = read_images([str(write_shards(tmp_path / "in", 1, 1))], 1)
    monkeypatch.setattr(extract, "make_images", lambda count: image)
    bench = ExtractBench(["saltern"], device="cuda", precision="bf16", rounds=2, large_shards=1)
    table = figures_table(found := list(measure(bench)))
    assert [figure.value for figure in found] == [0.9, 8100.0]
    assert found[0].name.startswith("end to end ÷ decode alone")
    assert "NVIDIA H200, bf16; ImageNet in 2.6 min" in table
    assert {row for row in asked if row[0] != "saltern"} == {(2, "cuda", 128)}
    assert all("cuda" in row for row in asked)
    assert len(asked) == 4


def test_without_ray_its_figures_are_skipped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(\"No module named 'ray'\")"]
    found = engines(ExtractBench(command), tmp_path, tmp_path)
    assert [figure.verdict() for figure in found] == ["skipped", "skipped"]
    report = Report(tmp_path / "extract", {}, "", parts={"figures": found})
    report.write(figures_table(found))
    assert json.loads((tmp_path / "extract.json").read_text())["figures"][0]["value"] is None
    assert "No module named 'ray'" in found[0].note
