"""Tests of `saltern bench extract`: it runs, and reports every figure. No test depends on a figure's value."""

import json
import math
import sys
from pathlib import Path

import pytest
from making import write_shards

from saltern.pipeline.bench.extract import measure
from saltern.pipeline.bench.figures import Figure, as_json, as_markdown, by_turns, describe_machine
from saltern.pipeline.bench.workers import engines
from saltern.pipeline.bench.workload import ExtractBench, Supply, make_shards
from saltern.schemas.errors import UserError


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


def test_work_goes_round_the_shards(tmp_path: Path) -> None:
    supply = Supply.of([str(write_shards(tmp_path, 2, 6))])
    assert [(shard.name, shard.take) for shard in supply.images(15)] == [("000000", 6), ("000001", 6), ("000002", 3)]
    assert [shard.take for shard in supply.images(9, 4)] == [4, 4, 1]
    write_shards(tmp_path / "empty", 1, 0)
    with pytest.raises(UserError, match="no samples"):
        Supply.of([str(tmp_path / "empty")])


def test_made_pictures_weigh_as_much_as_photographs(tmp_path: Path) -> None:
    make_shards(tmp_path / "made", 2, 3)
    supply = Supply.of([str(tmp_path / "made")])
    assert supply.samples == [3, 3]
    assert all(40_000 < shard.size / 3 < 250_000 for shard in supply.shards)


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path, ray_address: str) -> None:
    bench = ExtractBench(
        command=[sys.executable, "-m", "saltern"],
        shards=[str(write_shards(tmp_path, 2, 16))],
        model="saltern.pipeline.bench.workload:Net",
        method="saltern.pipeline.bench.workload:Noop",
        batch_size=4,
        rounds=1,
        seconds=0.05,
        stored_images=8,
        few_shards=1,
        many_shards=2,
        done_shards=20,
        loop_shards=20,
    )
    figures = measure(bench, lambda: ray_address)  # connected already
    machine = describe_machine()
    made = json.loads(as_json(figures, {"rounds": 1}, machine))
    assert set(made) == {"machine", "settings", "figures"}
    assert {"cpu", "cores", "gpu", "load_average", "versions", "date"} <= set(made["machine"])
    for row in made["figures"]:
        assert math.isfinite(row["value"]), row["name"]
        assert row["value"] > 0, row["name"]
        assert row["verdict"].startswith(("met", "MISSED")), row["name"]
    names = " ".join(row["name"] for row in made["figures"])
    for part in ("method alone", "decoding alone", "stored", "memory", "resume", "driver loop", "--help", "2 actors"):
        assert part in names
    assert as_markdown(figures, machine).count("\n| ") == 2 + len(figures)  # heads and the line below them


def test_without_ray_its_figures_are_skipped(tmp_path: Path) -> None:
    def absent() -> None:
        raise ImportError("No module named 'ray'")

    supply = Supply.of([str(write_shards(tmp_path, 1, 1))])
    found = engines(ExtractBench(command=[]), supply, absent)
    assert [figure.verdict() for figure in found] == ["skipped", "skipped"]
    assert json.loads(as_json(found, {}, {}))["figures"][0]["value"] is None
    assert "No module named 'ray'" in found[0].note
