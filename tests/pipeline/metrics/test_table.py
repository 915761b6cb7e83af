"""Lines about runs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from saltern.pipeline.metrics.table import notes


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        ([["x"], ["x"], ["x"]], ["x"]),
        ([["x", "y"], ["x"], ["x"]], ["x", "a: y"]),
        ([["x"], ["x"], ["y"]], ["all but c: x", "c: y"]),
        ([["x"], [], []], ["a: x"]),
        ([["x"]], ["x"]),
        ([[], []], []),
    ],
)
def test_each_line_is_said_once_with_the_runs_that_it_is_about(said: list[list[str]], lines: list[str]) -> None:
    runs = [SimpleNamespace(run=SimpleNamespace(path=path), notes=own) for path, own in zip("abc", said, strict=False)]
    assert list(notes(cast(Any, SimpleNamespace(runs=runs)))) == lines
