"""The README against the code: what it names is there, and what is there is named."""

import re
import shlex
from pathlib import Path

import pytest

from saltern.jobs.main import app
from saltern.schemas.saliency import STATUSES, table_schema

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> dict[str, set[str]]:
    """The options of each command."""
    import typer

    group = typer.main.get_command(app)
    return {name: {word for option in found.params for word in option.opts} for name, found in group.commands.items()}


def calls() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    lines = [line.removeprefix("$ ").split("  #")[0] for block in blocks for line in block.splitlines()]
    return [call for line in lines for call in line.split(" && ") if call.startswith("saltern ")]


@pytest.mark.parametrize("call", calls())
def test_each_call_is_one_that_there_is(call: str) -> None:
    name, *words = shlex.split(call.removeprefix("saltern "))
    assert name in commands()
    assert {word for word in words if word.startswith("-")} <= commands()[name]


def test_there_are_calls_to_check() -> None:
    assert len(calls()) >= 6


def test_the_columns_are_all_there_in_order() -> None:
    table = README[README.index("| column |") : README.index("It opens with")]
    named = [name for row in table.splitlines()[2:] if row.startswith("|") for name in row.split("|")[1].split(",")]
    assert [name.strip() for name in named] == table_schema(None).names
    assert set(re.findall(r"`(\w+)`", table)) - {"cls"} == set(STATUSES)


def test_the_files_to_read_are_there() -> None:
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
    assert len(re.findall(r"^\d\. \[", README, re.M)) == 6
