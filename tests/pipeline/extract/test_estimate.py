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
