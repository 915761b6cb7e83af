"""README, docs/ and examples/ name only what exists in the code, and name all commands and options."""

import json
import re
import shlex
import tomllib
from enum import Enum
from pathlib import Path

import duckdb
import pytest
import typer
from judging import BLANK, annotate, judge, rows_of
from made_run import make_run

from saltern.jobs.main import EXIT_CODES, app
from saltern.pipeline.methods import available
from saltern.pipeline.metrics.families import FAMILIES, option_name
from saltern.schemas.saliency import STATUSES, table_schema

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def commands() -> dict[str, dict[str, object]]:
    """Return the options of each command with their types. Sub-commands have names like `bench extract`."""
    found: dict[str, dict[str, object]] = {}

    def walk(group: object, prefix: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{prefix}{name} ")
            found[prefix + name] = {
                word: getattr(param, "bare_type", lambda: None)() for param in command.params for word in param.opts
            }

    walk(typer.main.get_command(app), "")
    return found


COMMANDS = commands()


def calls() -> list[tuple[str, str]]:
    """Return (page, call) of every `saltern ...` line in a code block or in the table of examples."""
    found = []
    for page in PAGES:
        content = page.read_text()
        lines = [
            line for block in re.findall(r"^```\w*\n(.*?)^```", content, re.M | re.S) for line in block.splitlines()
        ]
        lines += re.findall(r"`[^`\n]*?(saltern \w[^`\n]*? -[^`\n]*)`", content)
        for line in lines:
            for call in line.removeprefix("$ ").split("  #")[0].split(" # ")[0].split(" && "):
                if call.startswith("saltern ") and "COMMAND" not in call:
                    found.append((page.name, call))
    return found


def check(words: list[str]) -> None:
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS
    options = COMMANDS[name]
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word == "--":
            return check(words[words.index("--") + 1 :])
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{name} has no {word}"
            kind = options[word.partition("=")[0]]
            if isinstance(kind, type) and issubclass(kind, Enum):
                assert value in [choice.value for choice in kind]


@pytest.mark.parametrize(("page", "call"), calls())
def test_each_call_is_possible(page: str, call: str) -> None:
    words = shlex.split(call.removeprefix("saltern "))
    if words != ["..."] and not words[0].startswith("--"):
        check([word for word in words if word != "..."])


def test_there_are_calls_to_check() -> None:
    assert len(calls()) >= 25
    assert {page for page, _ in calls()} >= {
        "README.md",
        "casm.md",
        "cluster.md",
        "dataset.md",
        "methods.md",
        "speed.md",
    }


def test_the_columns_are_complete_and_in_order() -> None:
    table = re.search(r"^\| column \|.*?\n\n", text("docs/dataset.md"), re.M | re.S)[0]
    named = [name for row in table.splitlines()[2:] if row.startswith("|") for name in row.split("|")[1].split(",")]
    assert [name.strip() for name in named] == table_schema(None).names
    assert set(re.findall(r"`(\w+)`", table)) - {"cls"} == set(STATUSES)


def test_the_statuses_and_exit_codes_are_complete() -> None:
    rows = re.findall(r"^\| `?(\w+)`? \| (.*?) \|", text("docs/errors.md"), re.M)
    assert set(STATUSES) <= {name for name, _ in rows}
    codes = {name for name, _ in rows if name.isdecimal()}
    assert codes == {"0", "1", "2", "3", "75", "130"}
    assert codes <= set(re.findall(r"\d+", EXIT_CODES))


def test_the_methods_are_complete() -> None:
    table = re.search(r"^\| family \|.*?\n\n", text("docs/methods.md"), re.M | re.S)[0]
    named = set(re.findall(r"`([\w+-]+)`", table)) - {"--method"}
    assert named == set(available())


def test_the_metrics_are_complete_with_their_directions() -> None:
    table = re.search(r"^\| family \| metric \|.*?\n\n", text("docs/evaluation.md"), re.M | re.S)[0]
    cells = [row.split("|")[2] for row in table.splitlines()[2:] if row.startswith("|")]
    named = [pair for cell in cells for pair in re.findall(r"`([\w-]+)` ?([↑↓]?)", cell)]
    metrics = {name: metric for family in FAMILIES.values() for name, metric in family.metrics.items()}
    assert named == [(option_name(name), metric.better.value) for name, metric in metrics.items()]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) == list(FAMILIES)


def test_each_published_figure_has_its_commands_and_what_differs() -> None:
    section = text("docs/evaluation.md").partition("## Published figures\n")[2]
    figures = re.split(r"^\*\*", section, flags=re.M)[1:]
    assert len(figures) == 4
    for figure in figures:
        assert re.search(r"^saltern extract .*--method .*\nsaltern evaluate .*--metric ", figure, re.M), figure[:40]
        assert "--squash" in figure
        assert "--resize" not in figure  # extract refuses both
        assert re.search(r"^```\n.*\bhere\b", figure, re.M | re.S | re.I), figure[:40]


@pytest.mark.slow
def test_the_query_gives_the_mean_of_the_classes_rates(tmp_path: Path) -> None:
    made = make_run(tmp_path / "voc", method="cameras", json=BLANK)
    made.path = made.path.rename(tmp_path / "voc" / "cameras")
    corners = [(0, 0, 4, 4), (50, 34, 59, 43), (20, 10, 40, 30)]

    def boxes(key: str) -> bytes:
        shard, label = int(key[1]), int(key[3])
        box = corners[(shard * label) % 3]
        return b"{}" if key == "s1k1" else json.dumps({"boxes": [box], "distractors": label}).encode()

    annotate(made, boxes)
    judge(made.path)
    query = re.search(r"^```sql\n(.*?)^```", text("docs/evaluation.md"), re.M | re.S)[1]
    ((rate, difficult),) = duckdb.sql(query.replace("'voc/", f"'{tmp_path}/voc/")).fetchall()
    hits: dict[str, list[float]] = {}
    for row in rows_of(made):
        hits.setdefault(row["key"][3], []).extend([] if row["pointing"] is None else [row["pointing"]])
    rates = {label: sum(found) / len(found) for label, found in hits.items()}
    assert rate == pytest.approx(sum(rates.values()) / 5)
    assert rate != pytest.approx(sum(sum(found) for found in hits.values()) / 14)
    del rates["0"]  # it has no distractors; all boxes are small
    assert difficult == pytest.approx(sum(rates.values()) / 4)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_to_files(page: Path) -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_the_extras_exist() -> None:
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"'\.\[([\w,]+)\]'", page.read_text()):
            assert set(names.split(",")) <= set(extras), page


def test_the_readme_is_short_and_names_every_page() -> None:
    readme = text("README.md")
    assert len(readme.splitlines()) <= 150
    for page in ROOT.glob("docs/*.md"):
        assert f"docs/{page.name}" in readme
    assert "**`--target`**" in readme
    assert len(re.findall(r"^\d\. \[", readme, re.M)) == 6
