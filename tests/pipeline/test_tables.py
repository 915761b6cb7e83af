"""Tests of the Markdown table writer."""

import pytest

from saltern.pipeline.tables import ALIGNED, markdown_table


def test_columns_are_aligned() -> None:
    table = markdown_table(["run", "LE %"], [["grad-cam", "48.2 ± 0.4"], ["centre", "-"]])
    assert table.split("\n") == [
        "| run      | LE %       |",
        "| -------- | ---------- |",
        "| grad-cam | 48.2 ± 0.4 |",
        "| centre   | -          |",
    ]


def test_a_long_cell_does_not_widen_the_others() -> None:
    long = "x" * 100
    table = markdown_table(["name", "note"], [["a", long], ["b", ""]])
    assert table.splitlines() == [
        f"| name | {'note'.ljust(ALIGNED)} |",
        f"| ---- | {'-' * ALIGNED} |",
        f"| a    | {long} |",
        f"| b    | {' ' * ALIGNED} |",
    ]


def test_cells_cannot_break_the_table() -> None:
    assert markdown_table(["a"], [["x | y\nz"]]).splitlines()[2] == r"| x \| y z |"
    assert markdown_table(["a"], [["x\x1b[2J\u202e"]]).splitlines()[2] == r"| x\x1b[2J\u202e |"


def test_a_table_without_rows_keeps_its_heads() -> None:
    assert markdown_table(["a", "b"], []) == "| a | b |\n| - | - |"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        markdown_table(["a", "b"], [["1"]])
