"""`saltern show` as a user calls it."""

from pathlib import Path

import pytest
from made_run import make_run
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.schemas.errors import UserError


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["show", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_page_is_in_the_run_and_its_path_is_printed(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    assert run(str(made.path)) == f"{made.path}/show.html\n"
    assert (made.path / "show.html").read_text().count("<article") == 5


def test_options(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    page = tmp_path / "page.html"
    assert run(str(made.path), "--out", str(page), "--sort", "score", "--limit", "2") == f"{page}\n"
    assert page.read_text().count("<article") == 2
    assert not (made.path / "show.html").exists()


@pytest.mark.slow
def test_errors_name_the_fix(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    for words, fix in [
        ([str(tmp_path)], f"give one of the runs in it: {made.path}"),
        ([str(tmp_path / "nothing")], "saltern extract"),
        ([str(made.path), "--sort", "nosuch"], "score"),
        ([str(made.path), "--out", str(tmp_path / "no" / "page.html")], "--out"),
    ]:
        with pytest.raises(UserError, match=fix):
            run(*words)
    made.data(0).unlink()
    with pytest.raises(UserError, match="saltern verify"):
        run(str(made.path))
    assert not (made.path / "show.html").exists()
