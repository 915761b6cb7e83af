"""An export overwrites nothing of others, and leaves whole files or none, also in an object store."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import call, refused
from judging import alter
from made_run import make_run, write_shard
from s3server import BUCKET, S3, used_server

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.engine.derived import StoppedError
from saltern.pipeline.export import sidecars
from saltern.pipeline.export.export import export
from saltern.pipeline.export.folder import check, records
from saltern.pipeline.runs.reader import Row, SaliencyRun, open_run
from saltern.pipeline.storage.session import session
from saltern.schemas.choices import ExportFormat
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard
from saltern.schemas.seal import seal


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of an export, without its records."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: raw for name, raw in found.items() if not name.startswith(".export/")}


@pytest.mark.slow
@pytest.mark.parametrize("form", list(ExportFormat))
def test_a_repeated_export_writes_the_same_files_again(tmp_path: Path, form: str) -> None:
    made = make_run(tmp_path, broken=((0, 1),))
    out = tmp_path / "out"
    assert export(str(made.path), form, str(out)).failures == {}
    first = content(out)
    assert first
    for path in out.rglob("*"):
        if path.is_file() and ".export" not in path.parts and path.name != "export.json":
            path.write_bytes(b"cut")
    assert export(str(made.path), form, str(out)).rows == 15
    assert content(out) == first
    names = [path.name for path in out.rglob("*")]
    assert not [name for name in names if name.startswith(("_tmp", ".lock"))]


def lines(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", list(ExportFormat))
def test_a_stopped_export_goes_on_to_equal_files(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    export(str(made.path), form, str(whole))
    read = SaliencyRun.read

    def interrupted(run: SaliencyRun, shard: Shard) -> Iterator[Row]:
        for number, row in enumerate(read(run, shard)):
            if shard.name == "part1/train" and number == 3:
                raise RuntimeError("out of luck")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(SaliencyRun, "read", interrupted)
        with pytest.raises(RuntimeError, match="out of luck"):
            export(str(made.path), form, str(out))
    stopped = content(out)
    # What there is, is whole; of png, whose files are many, some of a shard are there.
    assert all(content(whole)[name] == raw for name, raw in stopped.items())
    assert "instances.json" not in stopped
    capsys.readouterr()
    assert export(str(made.path), form, str(out)).rows == 15
    done = sum((out / f".export/data/part{number}/train.parquet").exists() for number in range(3))
    assert done == 3
    assert content(out) == content(whole)


def test_only_what_is_missing_or_replaced_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(tmp_path)
    out = tmp_path / "out"
    export(str(made.path), "wds", str(out))
    before = content(out)
    (out / "part1/train.tar").unlink()
    capsys.readouterr()
    export(str(made.path), "wds", str(out))
    assert "2 of 3 shards done, 1 to do" in lines(capsys)
    assert content(out) == before
    alter(made, score=0.5)  # the run was done again
    (tmp_path / "old").hardlink_to(out / "part0/train.tar")
    export(str(made.path), "wds", str(out))
    assert "0 of 3 shards done, 3 to do" in lines(capsys)
    assert all(content(out)[name] != raw for name, raw in before.items() if name != "export.json")
    assert not (out / "part0/train.tar").samefile(tmp_path / "old")


def test_pictures_of_samples_that_are_gone_are_removed(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2)
    export(str(made.path), "png", str(tmp_path / "out"))
    mine = tmp_path / "out/part0/train/mine.png"
    mine.write_bytes(b"mine")
    rows = pq.read_table(made.data(0)).to_pylist()[:3]
    write_shard(made, 0, 3, rows, (4, 4))  # the shard was made again, with fewer samples
    assert export(str(made.path), "png", str(tmp_path / "out")).rows == 8
    kept = {path.name for path in (tmp_path / "out/part0/train").iterdir()}
    assert kept == {f"s0k{n}.{kind}.png" for n in range(3) for kind in ("map", "mask")} | {"mine.png"}
    assert len(list((tmp_path / "out/part1/train").iterdir())) == 10


def test_a_disk_that_is_full_stops_it_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path)
    add, calls = sidecars._add, []

    def full(*words: object) -> None:
        calls.append(words)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(*words)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sidecars, "_add", full)
        with pytest.raises(StoppedError) as stopped:
            export(str(made.path), "wds", str(tmp_path / "out"))
    assert stopped.value.result.code == 1
    assert f"cannot write to {tmp_path}/out: No space left on device; finished shards are kept" in lines(capsys)
    assert len(content(tmp_path / "out")) < 3
    assert export(str(made.path), "wds", str(tmp_path / "out")).shards == 3


def test_an_export_of_an_older_version_is_written_again(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_bytes(seal({"format": "npy", "fingerprint": made.run.fingerprint}))
    with pytest.raises(UserError, match=r"holds an export as npy of the run .* not as wds"):
        export(str(made.path), "wds", str(out))
    assert export(str(made.path), "npy", str(out)).shards == 3
    (out / ".export/run.json").write_text("{")
    with pytest.raises(UserError, match=rf"run.json is damaged .*; remove {out}/.export/ and repeat the command"):
        export(str(made.path), "npy", str(out))
    (out / "export.json").write_text("{")
    with pytest.raises(UserError, match=r"export.json is damaged .*; give another --out"):
        export(str(made.path), "npy", str(out))


@pytest.mark.slow
def test_workers_of_a_cluster_write_the_same_files(tmp_path: Path, ray_address: str) -> None:
    made = make_run(tmp_path)
    made.data(1).write_bytes(b"cut")
    for form in (ExportFormat.coco, ExportFormat.npy):
        here, there = (tmp_path / f"{form}-{name}" for name in ("here", "there"))
        assert list(export(str(made.path), form, str(here)).failures) == ["part1/train"]
        options = RunOptions(str(there), engine="ray", address=ray_address, workers=2)
        assert list(export(str(made.path), form, str(there), options=options).failures) == ["part1/train"]
        assert content(there) == content(here)


def test_a_run_without_shards_can_be_exported_again(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=0)
    for _ in range(2):
        assert export(str(made.path), "coco", str(tmp_path / "out")).shards == 0
    assert json.loads(content(tmp_path / "out")["instances.json"])["images"] == []


def test_damaged_records_are_answered_with_the_fix(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    export(str(made.path), "coco", str(tmp_path / "out"))
    part = tmp_path / "out/.export/data/part0/train.parquet"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(UserError, match=rf"cannot be read .*; remove {tmp_path}/out/.export and repeat"):
        export(str(made.path), "coco", str(tmp_path / "out"))


def test_an_export_goes_on_with_tars_that_were_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(tmp_path)
    out = tmp_path / "out"
    export(str(made.path), "coco", str(out))
    before = content(out)
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    (out / ".export/receipts/part1/train.json").unlink()
    assert list(export(str(made.path), "coco", str(out)).failures) == ["part1/train"]
    capsys.readouterr()
    assert export(str(made.path), "coco", str(out), [str(tmp_path / "elsewhere")]).failures == {}
    assert "2 of 3 shards done, 1 to do" in lines(capsys)
    assert content(out) == before


def test_records_are_counted_and_are_no_run_to_verify(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    export(str(made.path), "npy", str(tmp_path / "out"))
    assert "1 of 1 shards done, 5 samples" in call("status", tmp_path / "out/.export").stdout
    assert "results that derive from a run" in refused(call("verify", tmp_path / "out/.export"))


def test_two_exports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    store = records(str(tmp_path / "out"))
    with session(store), pytest.raises(UserError, match="another command is writing"):
        export(str(made.path), "wds", str(tmp_path / "out"))
    assert export(str(made.path), "wds", str(tmp_path / "out")).shards == 1


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
    with pytest.raises(UserError, match="no name of a file"):
        check(str(tmp_path / "out"), open_run(str(made.path)), "wds")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_run_is_refused_unless_its_done_shards_are_named(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    (made.path / "receipts/part1/train.json").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards, .* part1/train; .*saltern extract"):
        export(str(made.path), "wds", str(tmp_path / "out"))
    done = [made.run.shards[number].url for number in (0, 2)]
    assert export(str(made.path), "wds", str(tmp_path / "out"), done).shards == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", [ExportFormat.wds, ExportFormat.coco])
def test_a_bucket_gets_the_files_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    made = make_run(tmp_path, shards=2)
    export(str(made.path), form, str(tmp_path / "out"))
    with used_server(monkeypatch) as s3:
        assert isinstance(s3, S3)
        assert export(str(made.path), form, f"s3://{BUCKET}/out").rows == 10
        assert export(str(made.path), form, f"s3://{BUCKET}/out").rows == 10
        found = {name.removeprefix("out/"): raw for name, raw in s3.objects.items() if raw}
        name = "part1/train.tar" if form == "wds" else "instances.json"
        del s3.objects[f"out/{name}"]
        assert export(str(made.path), form, f"s3://{BUCKET}/out").rows == 10
        assert s3.objects[f"out/{name}"] == found[name]
    found = {name: raw for name, raw in found.items() if not name.startswith(".export/")}
    assert found == content(tmp_path / "out")


@pytest.mark.slow
def test_the_command_counts_and_names_what_failed(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    ended = call("export", made.path, "--format", "coco", "--out", tmp_path / "out")
    assert (ended.returncode, ended.stdout) == (0, f"15 rows of 3 shards as coco in {tmp_path}/out\n")
    made.data(1).unlink()
    ended = call("export", made.path, "--format", "npy", "--out", tmp_path / "npy")
    assert ended.returncode == 1
    assert ended.stdout == f"10 rows of 2 shards as npy in {tmp_path}/npy\n"
    assert ended.stderr.splitlines()[-1].startswith("part1/train: ")
    assert "saltern verify" in ended.stderr
    line = refused(call("export", made.path, "--format", "npy", "--out", tmp_path / "out"))
    assert "holds an export as coco" in line
    assert json.loads((tmp_path / "out/export.json").read_bytes())["fingerprint"] == made.run.fingerprint
