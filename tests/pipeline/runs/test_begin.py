"""A run that begins removes and overwrites only files that the records of the run before it name."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from extracting import extract
from making import HELPERS, write_shards

from saltern.schemas.errors import UserError


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", ["data", "receipts", "failures", "metrics", "pictures"])
@pytest.mark.parametrize("settings", [{}, {"overwrite": True}])
def test_inputs_where_the_run_writes_are_refused(tmp_path: Path, folder: str, settings: dict[str, Any]) -> None:
    run = tmp_path / "run"
    write_shards(run / folder / "deep", 2, 1)
    (run / "run.json").write_text("{}")
    before = content(tmp_path)
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=rf"part-000000.tar: this input lies in .*run/{folder}"):
        extract(run / folder, run, settings)
    del before["run/run.json"]
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_inputs_where_the_run_writes_are_refused_behind_links(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    write_shards(run / "data", 1, 1)
    if kind == "folder":
        (tmp_path / "in").symlink_to(run / "data")
    else:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.tar").symlink_to(run / "data/part-000000.tar")
    (tmp_path / "out").symlink_to(run)
    with pytest.raises(UserError, match="this input lies in"):
        extract(tmp_path / "in", tmp_path / "out", {"overwrite": True})
    assert sorted(content(run)) == ["data/part-000000.tar"]


def test_overwrite_removes_what_the_run_names_and_nothing_else(tmp_path: Path) -> None:
    """Files of the user survive wherever they are: also other shards that were moved into the run's folders."""
    run = tmp_path / "run"
    write_shards(tmp_path / "in", 3, 2)
    assert extract(tmp_path / "in", run) == 0
    mine = ["notes.txt", "pictures.png", "show.html", "data/other.parquet", "data/train/x.tar", "receipts/other.json",
            "metrics/mine.csv", "metrics/mine.json", "metrics/plot.png", "metrics/mine/run.json",
            "metrics/mine/data/part-000000.parquet", "pictures/cat.png", "failures/why.txt"]  # fmt: skip
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).write_text("mine")
    (run / "failures/part-000000.json").write_text("{}")
    its = ["localization.json", "masked.png", "sanity.png", "road-controls/run.json", "road/data/part-000001.parquet"]
    for name in its:
        (run / "metrics" / name).parent.mkdir(exist_ok=True, parents=True)
        (run / "metrics" / name).write_text("{}")
    (tmp_path / "in/part-000002.tar").unlink()
    assert extract(tmp_path / "in", run, {"overwrite": True}, target="top1") == 0
    made = [
        f"{kind}/part-00000{number}.{end}"
        for kind, end in (("data", "parquet"), ("receipts", "json"))
        for number in (0, 1)
    ]
    assert sorted(content(run)) == sorted([*mine, *made, "run.json"])
    assert {(run / name).read_text() for name in mine} == {"mine"}


def test_overwrite_keeps_an_input_that_has_the_name_of_a_data_file(tmp_path: Path) -> None:
    """The input of the run before lies under the name of its own data file, through a link made later."""
    run = tmp_path / "run"
    write_shards(tmp_path / "in", 2, 2)
    assert extract(tmp_path / "in/part-000000.tar", run) == 0
    data = run / "data/part-000000.parquet"
    shutil.move(tmp_path / "in/part-000000.tar", data)
    (tmp_path / "in/part-000000.tar").symlink_to(data)
    before = data.read_bytes()
    assert extract(tmp_path / "in/part-000001.tar", run, {"overwrite": True}) == 0
    assert data.read_bytes() == before


@pytest.mark.parametrize("settings", [{}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["data/part-000000.parquet", "receipts/part-000000.json"])
def test_a_file_of_another_origin_is_not_overwritten(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    run = tmp_path / "run"
    write_shards(tmp_path / "in", 2, 2)
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("years of work")
    with pytest.raises(UserError, match=f"{name} would be overwritten"):
        extract(tmp_path / "in", run, settings)
    assert content(run) == {name: b"years of work"}
    os.remove(run / name)
    assert extract(tmp_path / "in", run, settings) == 0


@pytest.mark.parametrize("raw", ["{}", '{"schema_version": 7}', "[]", "not json", '{"name": "my-web-app"}'])
def test_a_foreign_run_json_protects_its_folder(tmp_path: Path, raw: str) -> None:
    run = tmp_path / "run"
    write_shards(tmp_path / "in", 1, 2)
    write_shards(run / "data", 1, 2)
    (run / "run.json").write_text(raw)
    before = content(run)
    with pytest.raises(UserError, match=r"run\.json"):
        extract(tmp_path / "in", run, {"overwrite": True})
    assert content(run) == before
