"""An export overwrites nothing of others, and leaves whole files or none, also in an object store."""

import json
from pathlib import Path

import pytest
from commands import call, refused
from made_run import make_run
from s3server import BUCKET, S3, used_server

from saltern.pipeline.export import sidecars
from saltern.pipeline.export.export import export
from saltern.pipeline.export.folder import opened
from saltern.pipeline.runs.reader import open_run
from saltern.schemas.choices import ExportFormat
from saltern.schemas.errors import UserError


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", list(ExportFormat))
def test_a_repeated_export_writes_the_same_files_again(tmp_path: Path, form: str) -> None:
    made = make_run(tmp_path, broken=((0, 1),))
    out = tmp_path / "out"
    assert export(str(made.path), form, str(out)).failures == {}
    first = content(out)
    for path in out.rglob("part*/*"):
        if path.is_file():
            path.write_bytes(b"cut")
    assert export(str(made.path), form, str(out)).rows == 15
    assert content(out) == first
    assert not [name for name in first if "tmp" in name or "lock" in name]


def test_only_named_shards_are_exported(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    done = export(str(made.path), "wds", str(tmp_path / "out"), [made.run.shards[1].url])
    assert (done.shards, done.rows) == (1, 5)
    assert set(content(tmp_path / "out")) == {"export.json", "part1/train.tar"}


def test_what_it_did_not_write_stays(tmp_path: Path) -> None:
    made, other = make_run(tmp_path), make_run(tmp_path / "other", seed=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    done = tmp_path / "done"
    export(str(other.path), "wds", str(done))
    before = content(tmp_path)
    for form, out, words in [
        ("wds", foreign, "letter.txt.*new or an empty"),
        ("coco", done, "export as wds of the run .* not as coco"),
        ("wds", done, "remove it"),
        ("wds", tmp_path / "shards", "give another folder"),
        ("wds", tmp_path / "shards" / "part0", "input lies in"),
        ("wds", made.path, "lies in the run"),
        ("wds", made.path / "data", "lies in the run"),
        ("png", "s3://bucket/out", "local folder"),
    ]:
        with pytest.raises(UserError, match=words):
            export(str(made.path), form, str(out))
    assert content(tmp_path) == before


def test_a_run_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    raw = (made.path / "run.json").read_bytes().replace(b'"part0/train"', b'"../../up"').partition(b',\n "seal"')[0]
    old = raw.replace(b'"saltern": "0"', b'"saltern": "0.1.0"') + b"\n}"  # has no seal
    (made.path / "run.json").write_bytes(old)
    with (
        pytest.raises(UserError, match="no name of a file"),
        opened(str(tmp_path / "out"), open_run(str(made.path)), "wds"),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_an_incomplete_run_is_refused_unless_its_done_shards_are_named(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    (made.path / "receipts/part1/train.json").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards .* part1/train; .*saltern extract"):
        export(str(made.path), "wds", str(tmp_path / "out"))
    done = [made.run.shards[number].url for number in (0, 2)]
    assert export(str(made.path), "wds", str(tmp_path / "out"), done).shards == 2


def test_an_interrupted_shard_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    add, calls = sidecars._add, []

    def interrupted(*words: object) -> None:
        calls.append(words)
        if len(calls) == 8:
            raise KeyboardInterrupt
        add(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(sidecars, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(str(made.path), "wds", str(tmp_path / "out"))
    assert set(content(tmp_path / "out")) == {"export.json", "part0/train.tar"}


@pytest.mark.parametrize("form", [ExportFormat.wds, ExportFormat.coco])
def test_a_bucket_gets_the_files_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    made = make_run(tmp_path, shards=2)
    export(str(made.path), form, str(tmp_path / "out"))
    with used_server(monkeypatch) as s3:
        assert isinstance(s3, S3)
        assert export(str(made.path), form, f"s3://{BUCKET}/out").rows == 10
        assert export(str(made.path), form, f"s3://{BUCKET}/out").rows == 10
        found = {name.removeprefix("out/"): raw for name, raw in s3.objects.items() if raw}
    assert found == content(tmp_path / "out")


def test_the_command_counts_and_names_what_failed(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    ended = call("export", made.path, "--format", "coco", "--out", tmp_path / "out")
    assert (ended.returncode, ended.stdout) == (0, f"15 rows of 3 shards as coco in {tmp_path}/out\n")
    made.data(1).unlink()
    ended = call("export", made.path, "--format", "npy", "--out", tmp_path / "npy")
    assert ended.returncode == 1
    assert ended.stdout == f"10 rows of 2 shards as npy in {tmp_path}/npy\n"
    assert ended.stderr.startswith("part1/train: ")
    assert "saltern verify" in ended.stderr
    line = refused(call("export", made.path, "--format", "npy", "--out", tmp_path / "out"))
    assert "holds an export as coco" in line
    assert json.loads((tmp_path / "out/export.json").read_bytes())["fingerprint"] == made.run.fingerprint
