"""The table of `plan` is readable whatever the size of the dataset."""

import pytest

from saltern.pipeline.extract.estimate import Plan


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
