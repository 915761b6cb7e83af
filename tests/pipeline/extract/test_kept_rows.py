"""A receipt is believed only with its data file and its tar; rows are kept only from the receipt's own data file."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from extracting import extract
from making import HELPERS, files, picture, write_tar

from saltern.schemas.errors import UserError

FICKLE: dict[str, Any] = {"method": "odd_methods:Fickle", "layer": None, "target": "top1"}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


def pack(folder: Path, first: int, shards: int = 2) -> Path:
    """Write shards of bitmaps, so that other pictures make a tar of the same size."""
    for number in range(shards):
        samples = [
            (f"k{number}{index}", {"bmp": picture(first + index + 7 * number, kind="BMP")}) for index in range(4)
        ]
        write_tar(folder / f"part-{number}.tar", samples)
    return folder


def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a run in which the first row of each batch failed."""
    pack(tmp_path / "in", 0)
    monkeypatch.setenv("FICKLE", "1")
    extract(tmp_path / "in", tmp_path / "run", **FICKLE)
    monkeypatch.delenv("FICKLE")
    return tmp_path / "run"


def fresh(tmp_path: Path) -> dict[str, bytes]:
    assert extract(tmp_path / "in", tmp_path / "fresh", **FICKLE) == 0
    return files(tmp_path / "fresh")


def receipt(run: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"receipts/part-{number}.json").read_text())
    return found


@pytest.mark.parametrize("mtime", ["new", "restored"])
def test_rows_of_other_pictures_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mtime: str) -> None:
    """The tars were rewritten in place, with the same keys and sizes."""
    run = spoiled(tmp_path, monkeypatch)
    before = {path: path.stat() for path in (tmp_path / "in").iterdir()}
    pack(tmp_path / "in", 100)
    for path, stat in before.items():
        assert path.stat().st_size == stat.st_size
        if mtime == "restored":
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert extract(tmp_path / "in", run, {"retry_failed": True}, **FICKLE) == 0
    assert files(run) == fresh(tmp_path)
    assert receipt(run, 0)["content"] == receipt(tmp_path / "fresh", 0)["content"]


def test_a_shard_whose_tar_changed_is_done_again_and_one_that_was_touched_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "in", 0)
    run = tmp_path / "run"
    assert extract(tmp_path / "in", run, **FICKLE) == 0
    kept = (run / "data/part-1.parquet").stat()
    pack(tmp_path / "new", 100)
    os.replace(tmp_path / "new/part-0.tar", tmp_path / "in/part-0.tar")
    for number in (0, 1):
        os.utime(tmp_path / f"in/part-{number}.tar", ns=(5, 5))
    capsys.readouterr()
    assert extract(tmp_path / "in", run, **FICKLE) == 0
    assert "2 tars have another mtime than when they were read" in capsys.readouterr().err
    assert files(run) == fresh(tmp_path)
    assert (run / "data/part-1.parquet").stat().st_ino == kept.st_ino
    assert [receipt(run, number)["mtime_ns"] for number in (0, 1)] == [5, 5]
    assert extract(tmp_path / "in", run, **FICKLE) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut", "receipt"])
def test_a_receipt_without_its_data_is_not_believed(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "in", 0)
    run = tmp_path / "run"
    assert extract(tmp_path / "in", run, **FICKLE) == 0
    whole = files(run)
    data = run / "data/part-0.parquet"
    if damage == "missing":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        (run / "receipts/part-0.json").write_text("{")
    capsys.readouterr()
    assert extract(tmp_path / "in", run, **FICKLE) == 0
    said = capsys.readouterr().err
    why = {"missing": "its data file is missing", "cut": "its receipt says", "receipt": "its receipt is damaged"}[
        damage
    ]
    (line,) = [line for line in said.splitlines() if "done again" in line]
    assert line.startswith("done again, although it has a receipt: part-0: ")
    assert why in line
    assert "1 of 2 shards done, 1 to do" in said
    assert files(run) == whole


def test_rows_of_a_foreign_data_file_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the receipt's size, with one byte changed in a map."""
    run = spoiled(tmp_path, monkeypatch)
    data = run / "data/part-0.parquet"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 3] ^= 255
    data.write_bytes(raw)
    assert extract(tmp_path / "in", run, {"retry_failed": True}, **FICKLE) == 0
    assert files(run) == fresh(tmp_path)


def test_rows_of_a_receipt_that_does_not_tell_the_tars_content_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in runs of saltern 0.1, whose tars may have been rewritten since."""
    run = spoiled(tmp_path, monkeypatch)
    for number in (0, 1):
        old = receipt(run, number)
        for key in ("content", "mtime_ns", "seal"):
            old.pop(key, None)
        (run / f"receipts/part-{number}.json").write_text(json.dumps(old))
    made = json.loads((run / "run.json").read_text())
    made["versions"]["saltern"] = "0.1.0"
    made.pop("seal", None)
    (run / "run.json").write_text(json.dumps(made))
    pack(tmp_path / "in", 100)
    assert extract(tmp_path / "in", run, {"retry_failed": True}, **FICKLE) == 0
    fresh(tmp_path)
    for path in run.glob("data/*"):  # the file's metadata names the version
        assert pq.read_table(path).to_pylist() == pq.read_table(tmp_path / "fresh/data" / path.name).to_pylist()


def test_a_refused_call_leaves_a_finished_run_and_a_new_folder_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import making
    import torch

    made = iter(range(100))

    def unseeded() -> torch.nn.Module:
        model = making.tiny()
        torch.nn.init.constant_(next(model.parameters()), next(made))
        return model

    monkeypatch.setattr(making, "unseeded", unseeded, raising=False)
    pack(tmp_path / "in", 0)
    assert extract(tmp_path / "in", tmp_path / "run", **FICKLE) == 0
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    for wishes in (
        {"model": "making:nothing"},
        {"layer": "no.such"},
        {"target": "class:99"},
        {"crop": 0, "resize": -1},
    ):
        for folder in ("run", "new"):
            with pytest.raises(UserError):
                extract(tmp_path / "in", tmp_path / folder, {"overwrite": True}, **{**FICKLE, **wishes})
    with pytest.raises(UserError, match="another config"):
        extract(tmp_path / "in", tmp_path / "run", **{**FICKLE, "target": "label"})
    with pytest.raises(UserError, match="are not the run's"):  # which only the workers can find out
        extract(tmp_path / "in", tmp_path / "new", **{**FICKLE, "model": "making:unseeded"})
    assert {path: np.array(path.stat()[:7]).tolist() for path in tmp_path.rglob("*")} == {
        path: np.array(stat[:7]).tolist() for path, stat in before.items()
    }
    assert extract(tmp_path / "in", tmp_path / "new", **FICKLE) == 0
