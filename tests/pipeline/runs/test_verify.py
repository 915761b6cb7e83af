"""Each problem that `verify` finds carries a fix, and the fix ends it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import call
from extracting import extract
from making import HELPERS, write_shard, write_shards

from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.verify import Finding, verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_shards(folder / "in", 2, 2)
    write_shard(folder / "larger", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HELPERS)
        assert extract(folder / "in", folder / "run") == 0
    return folder


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bit rot": ("run/data/part-000001.parquet", flip),
    "longer data": ("run/data/part-000001.parquet", append),
    "no data": ("run/data/part-000001.parquet", Path.unlink),
    "a folder for data": ("run/data/part-000001.parquet", replace_by_folder),
    "receipt": ("run/receipts/part-000001.json", flip),
    "no receipt": ("run/receipts/part-000001.json", Path.unlink),
    "stranger": ("run/data/notes.txt", lambda path: path.write_text("mine")),
    "failure": ("run/failures/part-000001.json", lambda path: (path.parent.mkdir(), path.write_text("{"))),
    "a tar of another size": ("in/part-000001.tar", lambda path: shutil.copy(path.parents[1] / "larger", path)),
}


def findings(run: Path) -> list[Finding]:
    return verify(*load_run_folder(str(run))).findings


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_the_fix_of_a_problem_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The words of the fix are followed, so each test leaves the run whole for the next one."""
    monkeypatch.chdir(HELPERS)
    run = folder / "run"
    damaged, damage = DAMAGES[name]
    damage(folder / damaged)
    (found, *others) = findings(run)
    assert not others
    assert f"{found.shard}: {found.reason}; {found.fix}" in call("verify", run).stdout
    if deleted := re.search(r"delete (/\S+)", found.fix):
        path = Path(deleted[1])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif "delete it" in found.fix:
        (run / found.shard).unlink()
    if "repeat the command" in found.fix:
        assert extract(folder / "in", run) == 0
    assert findings(run) == []
