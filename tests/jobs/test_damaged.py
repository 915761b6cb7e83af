"""What others' data, names and permissions do to the read-only commands: one line, and no escape sequence."""

import builtins
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import call, refused
from made_run import make_run
from making import HELPERS, TINY, write_shards

from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError
from saltern.schemas.receipt import Failure

GRAD_CAM = (*TINY, "--method", "grad-cam", "--batch-size", "2", "--engine", "local")
ESCAPE = "\x1b[2J\u202e"


def test_control_characters_of_names_and_errors_are_escaped(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    (made.path / "receipts/part0/train.json").unlink()
    record = made.path / "failures/part0/train.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(Failure("part0/train", "data", f"bad {ESCAPE}", 1).to_json())
    for command in ("status", "verify"):
        said = call(command, made.path).stdout
        assert "bad \\x1b[2J\\u202e" in said
        assert "\x1b" not in said
    assert "\\x1b[2J\\u202e" in refused(call("status", f"{tmp_path}/{ESCAPE}"))


def test_control_characters_of_file_names_are_escaped_while_a_run_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 1, 2)
    (tmp_path / f"in/cut{ESCAPE}.tar").write_bytes(b"no tar")
    (tmp_path / f"in/link{ESCAPE}").symlink_to("nowhere")
    ended = call("extract", tmp_path / "in", "--out", tmp_path / f"run{ESCAPE}", *GRAD_CAM, "--device", "cpu")
    assert ended.returncode == 1
    (tmp_path / f"in/cut{ESCAPE}.tar").unlink()
    planned = call("plan", tmp_path / "in")
    for said in (ended, planned):
        assert "\x1b" not in said.stdout + said.stderr
        assert "\u202e" not in said.stdout + said.stderr
        assert "link\\x1b[2J\\u202e is a link to nowhere" in said.stderr
    assert ".tar: not a tar" in ended.stderr
    assert "run\\x1b[2J\\u202e" in ended.stdout


@pytest.mark.parametrize(
    "value", ["[" * 100_000, '{"boxes": [[0, 0, 1e60, 1e60]], "name": "\\ud800"}', '{"boxes": [[9' + "9" * 400 + "]]}"]
)
def test_hostile_json_of_samples_is_shown_and_counted(tmp_path: Path, value: str) -> None:
    made = make_run(tmp_path, shards=1, samples=2, json=value.encode())
    assert call("show", made.path).returncode == 0
    ended = call("evaluate", made.path)
    assert ended.returncode == 2
    assert "none of the 2 samples has boxes" in ended.stderr.splitlines()[-1]  # after those of the engine


def test_control_characters_of_class_names_do_not_reach_the_page(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=json.dumps({"name": f"cat{ESCAPE}"}).encode(), class_names=[ESCAPE] * 10)
    assert call("show", made.path).returncode == 0
    page = (made.path / "show.html").read_text()
    assert "cat\\x1b[2J\\u202e" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_show_writes_through_no_link(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (made.path / "show.html").symlink_to(victim)
    assert "is a link" in refused(call("show", made.path))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "receipts/part0/train.json"])
@pytest.mark.parametrize("command", ["status", "verify", "show", "evaluate"])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    made = make_run(tmp_path, shards=1)
    opened = builtins.open

    def forbidden(path: Any, *more: Any, **options: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(builtins, "open", forbidden)
    assert f"{made.path}/{name}: Permission denied" in refused(call(command, made.path))


def test_a_folder_that_may_not_be_listed_and_a_file_in_its_place_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HELPERS)
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="data is a file, where a folder should be"):
        Store(str(tmp_path)).listing("data", "")
    with pytest.raises(UserError, match=r"^/dev/null is a file, where a folder should be"):
        Store("/dev/null/run").read("run.json")
    for folder in (tmp_path / "data", tmp_path / "data/deep/run"):
        for line in (["status", folder], ["extract", write_shards(tmp_path / "in", 1, 1), "--out", folder, *GRAD_CAM]):
            assert refused(call(*line)).startswith(f"saltern: {tmp_path}/data is a file, where a folder should be")

    def forbidden(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=r"receipts.*: Permission denied"):
        Store(str(tmp_path)).listing("receipts", "")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_takes_no_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As a folder of another user, or one that is mounted read-only; root may write to any other."""
    monkeypatch.chdir(HELPERS)
    opened = os.open

    def refuse(path: Any, *more: Any, **options: Any) -> int:
        if str(path).endswith("/.lock"):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    line = ["extract", write_shards(tmp_path / "in", 1, 1), "--out", tmp_path / "run", *GRAD_CAM, "--device", "cpu"]
    ended = call(*line)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"saltern: --out {tmp_path}/run: ")
    assert os.strerror(code) in last
    assert not (tmp_path / "run").exists()
    line[3] = " "
    assert "--out is empty" in refused(call(*line))


def test_verify_says_which_tars_were_not_compared_and_takes_their_new_place(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2)
    (tmp_path / "shards").rename(tmp_path / "new")
    gone = call("verify", made.path)
    assert gone.returncode == 0
    assert "NOT PROVEN: the keys of 2 shards" in gone.stdout
    assert "0 tars counted again" in gone.stdout
    found = call("verify", made.path, "--shards", tmp_path / "new")
    assert "NOT PROVEN" not in found.stdout
    assert "2 tars counted again" in found.stdout


def test_status_notices_a_data_file_that_is_missing(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2)
    made.data(1).unlink()
    said = call("status", made.path)
    assert said.returncode == 1
    assert "1 of 2 shards done" in said.stdout
    assert "part1/train: not done, although it has a receipt: its data file is missing" in said.stdout
