"""The log of a training is cut where it resumes, and a file of another origin is refused and stays."""

from pathlib import Path

import pytest

from saltern.pipeline.training.journal import _cut
from saltern.schemas.errors import UserError


def test_lines_of_later_steps_and_an_incomplete_last_line_go(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    assert _cut(path, 2) == 2
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert _cut(tmp_path / "new.jsonl", 0) == 0


@pytest.mark.parametrize("line", ['{"event": "mine"}', "7", "[" * 100_000])
def test_a_log_of_another_origin_is_refused_and_stays(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"log\.jsonl is no log of a training; move it away"):
        _cut(path, 0)
    assert path.read_text() == f"{line}\n"
