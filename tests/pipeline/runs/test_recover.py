"""A run whose run.json was lost or damaged is resumed by its own command, and by no other."""

import shutil
from pathlib import Path

import pytest
from commands import call, refused
from extracting import extract
from making import HELPERS, files, write_shards

from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.verify import verify
from saltern.schemas.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    write_shards(folder / "in", 3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HELPERS)
        assert extract(folder / "in", folder / "run") == 0
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(HELPERS)
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["missing", "edited", "empty"])
def test_the_same_command_writes_run_json_again(original: Path, run: Path, damage: str) -> None:
    """One shard lost its receipt as well, another its data file: these two are done again, the third is kept."""
    before = (original / "run/run.json").read_bytes()
    edited = {"edited": before.replace(b'"crop": 32', b'"crop": 33'), "empty": b""}
    (run / "run.json").write_bytes(edited.get(damage, b""))
    if damage == "missing":
        (run / "run.json").unlink()
    said = refused(call("status", run))
    assert "repeat the command that made the run" in said
    (run / "receipts/part-000000.json").unlink()
    (run / "data/part-000001.parquet").unlink()
    kept = (run / "data/part-000002.parquet").stat().st_ino
    assert extract(original / "in", run) == 0
    assert load_run_folder(str(run))[1] == load_run_folder(str(original / "run"))[1]
    assert files(run) == files(original / "run")
    assert (run / "data/part-000002.parquet").stat().st_ino == kept
    assert verify(*load_run_folder(str(run))).findings == []


def test_the_versions_of_the_packages_that_made_the_run_stay(original: Path, run: Path) -> None:
    """They are in the metadata of every data file, with which run.json must agree."""
    (run / "run.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saltern.pipeline.runs.begin.version", lambda name: "9.9")
        assert extract(original / "in", run) == 0
    assert load_run_folder(str(run))[1] == load_run_folder(str(original / "run"))[1]
    assert verify(*load_run_folder(str(run))).findings == []


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("config", r"is of another config \(target\)"),
        ("fewer shards", "part-000000.parquet is of no shard of this command"),
        ("foreign data", "data/part-000000.parquet"),
        ("damaged receipt", "receipts/part-000000.json is not of this command: its receipt is damaged"),
    ],
)
def test_another_command_changes_nothing(original: Path, run: Path, damage: str, wrong: str, reason: str) -> None:
    if damage == "missing":
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text("{}")
    if wrong == "foreign data":
        (run / "receipts/part-000000.json").unlink()
        (run / "data/part-000000.parquet").write_text("years of work")
    if wrong == "damaged receipt":
        (run / "receipts/part-000000.json").write_text("{}")
    before = content(run)
    shards = f"{original}/in/part-00000[12].tar" if wrong == "fewer shards" else original / "in"
    more = {"target": "top1"} if wrong == "config" else {}
    for settings in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=reason) as caught:
            extract(shards, run, settings, **more)
        assert f"move {run}" in str(caught.value)
        assert "--out" in str(caught.value)
    assert content(run) == before


def test_overwrite_replaces_a_run_without_run_json(original: Path, run: Path) -> None:
    (run / "run.json").unlink()
    (run / "data/mine.txt").write_text("mine")
    (run.parent / "old").hardlink_to(run / "data/part-000002.parquet")  # keeps the number of its inode in use
    assert extract(original / "in", run, {"overwrite": True}) == 0
    assert files(run) == files(original / "run")
    assert not (run / "data/part-000002.parquet").samefile(run.parent / "old")
    assert (run / "data/mine.txt").read_text() == "mine"
