"""Evaluations that are disturbed: two at once, read-only folders, object stores, interruptions, full disks."""

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from judging import found_of, judge, rows_of
from made_run import Made, make_run
from naive_metrics import inclusive
from s3server import BUCKET, used_server
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.derived import StoppedError
from saltern.pipeline.metrics.processor import MetricProcessor
from saltern.pipeline.runs.outlet import Made as Output
from saltern.pipeline.storage.session import session
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, json=inclusive((10, 10, 40, 40)))


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--engine", "local"])


def results(made: Made) -> dict[str, bytes]:
    folder = made.path / "metrics"
    kept = [*folder.glob("*/data/*/*.parquet"), *folder.glob("*.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_of_two_evaluations_at_once_the_second_is_told_of_the_first_and_changes_nothing(made: Made) -> None:
    judge(made.path)
    before = results(made)
    (made.path / "receipts/part1/train.json").touch()
    with session(Store(str(made.path / "metrics/localization"))):
        (made.path / "metrics/localization/run.json").write_text("being written")
        with pytest.raises(UserError, match=rf"metrics/localization: another command .*process {os.getpid()}"):
            judge(made.path)
        shutil.copy(made.path / "metrics/localization-controls/run.json", made.path / "metrics/localization/run.json")
        with pytest.raises(UserError, match="another command"):  # of another config, which would replace it
            judge(made.path)
        judge(made.path, metrics=["statistics"])  # another family is another folder
        assert {name: raw for name, raw in results(made).items() if name in before} == before
    judge(made.path)
    assert {name: raw for name, raw in results(made).items() if name in before} == before


def test_a_read_only_folder_is_answered_with_a_copy_of_links(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makedirs = os.makedirs

    def read_only(path: str, *words: Any, **more: Any) -> None:
        if str(path).startswith(str(made.path)):
            raise OSError(errno.EROFS, "Read-only file system", path)
        makedirs(path, *words, **more)

    monkeypatch.setattr(os, "makedirs", read_only)
    with pytest.raises(UserError) as refused:
        judge(made.path)
    assert f"Read-only file system: '{made.path}/metrics/localization'; " in str(refused.value)
    assert str(refused.value).endswith(f"`cp -rs {made.path} COPY` links its files in a folder of yours")
    copy = tmp_path / "copy"
    for path in made.path.rglob("*"):  # as cp -rs
        if path.is_file():
            (copy / path.relative_to(made.path)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(made.path)).symlink_to(path)
    assert judge(copy).runs[0].census.judged == 15
    assert not (made.path / "metrics").exists()


@pytest.mark.slow
def test_a_run_and_shards_in_a_bucket_give_the_numbers_of_a_disk(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = found_of(made.path)
    with used_server(monkeypatch) as s3:
        for path in made.path.parent.rglob("*"):
            if path.is_file() and "metrics" not in path.parts:
                s3.objects[str(path.relative_to(made.path.parent))] = path.read_bytes()
        url = f"s3://{BUCKET}/run"
        for calls in range(2):
            s3.requests.clear()
            found = found_of(url, [f"s3://{BUCKET}/shards"])  # type: ignore[arg-type]
            assert found == expected
            # A reader fetches a file's footer and its rows. Readers are the jobs for the run and for the controls, of
            # which the second call has none to do, and OM's look at the labels.
            rows = Counter(line for line in s3.requests if line.startswith("GET run/data/"))
            assert list(rows.values()) == [2 if calls else 6] * 3
        read = Counter(line for line in s3.requests if line.startswith("GET run/metrics/") and "/data/" in line)
        assert list(read.values()) == [1] * 6  # the second call computed nothing
        assert json.loads(s3.objects["run/metrics/localization.json"])["samples"] == 15
        assert not [name for name in s3.objects if "_tmp-" in name or "_claim-" in name]


@pytest.mark.slow
def test_a_tar_that_is_gone_is_named_with_the_fix_and_costs_no_other(made: Made) -> None:
    tar = Path(made.run.shards[1].url)
    tar.rename(tar.with_suffix(".away"))
    ended = call(made.path, "--metric", "le", "--format", "json")
    assert ended.exit_code == 1
    assert json.loads(ended.stdout)["runs"][0]["samples"] == 10
    assert f"{tar} is gone; if the tars were moved, name them with --shards" in ended.stderr
    tar.with_suffix(".away").rename(tar)
    assert call(made.path, "--metric", "le").exit_code == 0
    assert len(rows_of(made)) == 15


@pytest.mark.slow
def test_an_interruption_keeps_what_is_done_and_the_same_command_goes_on(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(made.path)
    whole = results(made)
    shutil.rmtree(made.path / "metrics")
    process = MetricProcessor.process

    def interrupted(self: MetricProcessor, shard: Shard, earlier: Any = None) -> Output:
        if shard.name == "part2/train":
            raise KeyboardInterrupt
        return process(self, shard, earlier)

    with monkeypatch.context() as patch:
        patch.setattr(MetricProcessor, "process", interrupted)
        with pytest.raises(StoppedError) as stopped:
            judge(made.path)
    assert stopped.value.result.code == 130
    assert not (made.path / "metrics/localization.json").exists()
    capsys.readouterr()
    judge(made.path)
    assert "0 of 3 shards done" not in capsys.readouterr().err.splitlines()[1]
    assert results(made) == whole


@pytest.mark.slow
def test_a_full_disk_stops_the_evaluation_and_leaves_no_half_file(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("saltern.pipeline.runs.outlet.ShardWriter", full)
        with pytest.raises(StoppedError) as stopped:
            judge(made.path)
    assert stopped.value.result.code == 1
    with monkeypatch.context() as patch:  # when the summary is written
        write = Store.write
        patch.setattr(Store, "write", lambda self, name, raw: full() if "metrics/" in name else write(self, name, raw))
        with pytest.raises(UserError, match=rf"{made.path}: the results cannot be written there: .*No space left"):
            judge(made.path)
    assert not list((made.path / "metrics").rglob("*tmp*"))
    assert judge(made.path).runs[0].census.judged == 15


@pytest.mark.slow
def test_damaged_results_are_answered_with_the_fix(made: Made) -> None:
    judge(made.path)
    file = made.path / "metrics/localization/data/part1/train.parquet"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(
        UserError, match=rf"train.parquet is not what was written: .*; remove {made.path}/metrics/localization "
    ):
        judge(made.path)


def test_a_remark_about_all_runs_is_printed_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, json=inclusive((10, 10, 40, 40)), method=name) for name in ("cam", "layer-cam")]
    shutil.rmtree(tmp_path / "layer-cam/shards")
    moved = [tmp_path / "cam/shards/part0"]
    one = call(runs[0].path, runs[1].path, "--shards", *moved, "--metric", "le")
    assert one.exit_code == 0, one.output
    assert one.stderr.count("1 of the run's 3 shards are evaluated: ") == 1
