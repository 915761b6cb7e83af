"""The estimates of `plan`, and its table, which is readable whatever the size of the dataset."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call, refused
from extracting import REQUEST
from making import HELPERS, write_shards

from saltern.pipeline.extract.estimate import Plan, estimate


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(1, 20_480, 8, True, 400.0, 8 / 400 / 3600, 9_000), ["1 (20.5 kB)", "about 1 s", "about 9.0 kB"]),
        (Plan(6, 1_500_000, 120, True, 4.0, 1 / 120, 3e6), ["6 (1.5 MB)", "about 30 s", "about 3.0 MB"]),
        (Plan(1281, 147e9, 1_281_167, False, 80.0, 4.4, 68e9), ["1,281 (147 GB)", "about 4.4 h", "about 68.0 GB"]),
    ],
)
def test_a_plan_has_units_that_fit(plan: Plan, words: list[str]) -> None:
    table = plan.table()
    assert all(word in table for word in words), table


def test_a_plan_of_long_shards_says_what_a_stop_costs_and_how_to_pack() -> None:
    """CAMERAS makes about 1 image/s, so that a shard of 1,000 images takes 17 minutes."""
    slow = Plan(10, 10**9, 10_000, True, 1.0, 2.8, 10**8).table().splitlines()[-1]
    assert slow.startswith("resume   a shard takes about 17 min, which each stop or lost worker costs again;")
    assert "`saltern pack --per-shard 300` makes them last 5 min" in slow
    assert "resume" not in Plan(10, 10**9, 10_000, True, 2.0, 1.4, 10**8).table()
    assert "resume" not in Plan(10, 10**9, 10_000, True).table()


def test_several_methods_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    shards = [str(write_shards(tmp_path / "in", 2, 4))]
    plan, _ = estimate(replace(REQUEST, shards=shards, method="grad-cam,layer-cam,gradient"), "cpu", 1)
    alone, _ = estimate(replace(REQUEST, shards=shards, method="grad-cam"), "cpu", 1)
    assert list(plan.bytes_by_method) == ["grad-cam", "layer-cam", "gradient"]
    assert plan.output_bytes == sum(plan.bytes_by_method.values())
    assert plan.bytes_by_method["grad-cam"] == pytest.approx(alone.output_bytes, rel=0.02)
    assert alone.bytes_by_method == {}
    assert plan.hours == pytest.approx(8 / plan.images_per_s / 3600)
    time, output = plan.table().splitlines()[2:]
    assert time.endswith("images/s per worker, all 3 methods together")
    assert ": grad-cam " in output


def test_the_command_takes_several_methods(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", 1, 2)
    words = ("plan", shards, "--model", "making:tiny", "--layer", "body", "--device", "cpu", "--json")
    found = json.loads(call(*words, "--method", "grad-cam,layer-cam").stdout)
    assert found["bytes_by_method"].keys() == {"grad-cam", "layer-cam"}
    assert "grad-cam is named twice" in refused(call(*words, "--method", "grad-cam,grad-cam"))


def test_the_command_plans_what_extract_would_do(tmp_path: Path) -> None:
    """Size, target and stored maps change what a run costs."""
    shards = write_shards(tmp_path / "in", 1, 4)
    words = ("plan", shards, "--model", "making:tiny", "--layer", "body", "--device", "cpu", "--json")
    default, small, several, without = (
        json.loads(call(*words, *more).stdout)["output_bytes"]
        for more in ((), ("--crop", "64"), ("--target", "top:3"), ("--no-map",))
    )
    words = (*words[2:-1], "--method", "grad-cam", "--target", "top:3")
    made = call("extract", shards, "--out", tmp_path / "run", *words)
    assert made.returncode == 0, made.stderr
    stored = sum(path.stat().st_size for path in (tmp_path / "run/data").rglob("*.parquet"))
    assert several == pytest.approx(stored, rel=0.02)
    assert small < default < several
    assert without < default
