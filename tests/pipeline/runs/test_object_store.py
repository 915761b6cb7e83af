"""A run from shards in an object store into another folder of the store: resume, verify, no leftovers."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from extracting import REQUEST, extract
from made_run import make_run
from making import HELPERS, files, write_shards
from s3server import BUCKET, S3, used_server

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest
from saltern.pipeline.runs import writer
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.runs.verify import verify
from saltern.pipeline.storage import lock
from saltern.pipeline.storage.session import session
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> object:
    with used_server(monkeypatch) as server:
        yield server


def test_a_run_in_a_bucket_equals_one_on_a_disk(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 3, 5)
    assert extract(tmp_path / "in", tmp_path / "run") == 0
    for path in (tmp_path / "in").iterdir():
        s3.objects[f"in/{path.name}"] = path.read_bytes()
    request = ExtractRequest(**{**vars(REQUEST), "shards": [f"s3://{BUCKET}/in"], "torch_threads": 1})
    settings = RunOptions(f"s3://{BUCKET}/run", device="cpu", engine="local")
    assert conduct(extraction(request), settings).code == 0
    stored = {name.removeprefix("run/"): raw for name, raw in s3.objects.items() if name.startswith("run/data/")}
    assert stored == files(tmp_path / "run")
    assert not [name for name in s3.objects if "_tmp-" in name]
    # After the loss of a receipt, only its shard is read and written again.
    del s3.objects["run/receipts/part-000001.json"]
    s3.requests.clear()
    assert conduct(extraction(request), settings).code == 0
    assert [name for name in s3.requests if name.startswith("PUT run/data")] == ["PUT run/data/part-000001.parquet"]
    assert not [name for name in s3.requests if name.startswith("GET in/") and "part-000001" not in name]
    verdict = verify(*load_run_folder(settings.out))
    assert (verdict.findings, verdict.rows) == ([], 15)


def test_of_two_commands_with_two_configs_the_second_is_told_of_the_first(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HELPERS)
    monkeypatch.setattr(lock, "SETTLE_S", 0.1)
    write_shards(tmp_path / "in", 1, 2)
    request = replace(REQUEST, shards=[str(tmp_path / "in")], torch_threads=1)
    settings = RunOptions(f"s3://{BUCKET}/run", device="cpu", engine="local")
    with session(Store(settings.out)):
        before = {name for name in s3.objects if not name.endswith("/")}
        for options in (settings, replace(settings, overwrite=True)):
            with pytest.raises(UserError, match=rf"another command is writing this run \(host .*process {os.getpid()}"):
                conduct(extraction(replace(request, target="top1")), options)
        assert {name for name in s3.objects if not name.endswith("/")} == before
    assert conduct(extraction(request), settings).code == 0


def test_several_runs_in_a_bucket_equal_those_on_a_disk(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HELPERS)
    write_shards(tmp_path / "in", 2, 5)
    methods = ["grad-cam++", "eigen-cam"]
    assert extract(tmp_path / "in", tmp_path / "runs", method=",".join(methods)) == 0
    request = replace(REQUEST, shards=[str(tmp_path / "in")], torch_threads=1, method=",".join(methods))
    settings = RunOptions(f"s3://{BUCKET}/runs", device="cpu", engine="local")
    assert conduct(extraction(request), settings).code == 0
    for method in methods:
        folder = f"runs/{method}/"
        stored = {
            name.removeprefix(folder): raw for name, raw in s3.objects.items() if name.startswith(f"{folder}data")
        }
        assert stored == files(tmp_path / "runs" / method)
    assert not [name for name in s3.objects if "_tmp-" in name]


def test_rows_are_fetched_group_by_group_with_all_their_columns(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP", 2)
    made = make_run(tmp_path, shards=1, samples=5)  # three row groups
    for path in made.path.rglob("*.*"):
        s3.objects[f"run/{path.relative_to(made.path)}"] = path.read_bytes()
    expected = list(open_run(str(made.path)))
    run = open_run(f"s3://{BUCKET}/run")
    s3.requests.clear()
    rows = run.read(run.shards[0])
    first = next(rows)
    assert sum(line.startswith("GET") for line in s3.requests) == 2  # the footer, and the first group
    assert [first, *rows] == expected
    assert sum(line.startswith("GET") for line in s3.requests) == 4
