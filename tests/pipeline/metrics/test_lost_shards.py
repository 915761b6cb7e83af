"""Runs of the same samples stay comparable when a shard fails in one of them: it counts for none."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from judging import rows_of
from made_run import Made, make_run
from naive_metrics import inclusive

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.metrics.evaluate import EvaluateRequest, Evaluation, evaluate
from saltern.pipeline.metrics.table import remarks
from saltern.pipeline.metrics.wanted import left_out
from saltern.pipeline.runs.manifest import failure_name, receipt_name
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import CENTRE
from saltern.schemas.receipt import Failure
from saltern.schemas.run import Shard

BOX = inclusive((10, 10, 40, 40))
PART = "part1/train"


@pytest.fixture
def runs(tmp_path: Path) -> list[Made]:
    return [make_run(tmp_path / name, json=BOX, method=name) for name in ("cam", "layer-cam")]


def judge(runs: list[Made], *, metrics: Sequence[str] = ("le",), skip_failed: bool = False) -> Evaluation:
    request = EvaluateRequest([str(made.path) for made in runs], metrics=metrics, skip_failed=skip_failed)
    return evaluate(request, RunOptions("unused", engine="local"))


def check_same_samples(evaluation: Evaluation, samples: int) -> None:
    for judged in evaluation.runs:
        assert (judged.census.judged, judged.estimates["le"].count) == (samples, samples)
        summary = json.loads((Path(judged.run.path) / "metrics/localization.json").read_text())
        assert (summary["samples"], summary["metrics"]["le"]["count"]) == (samples, samples)
        assert summary["unread_shards"] == judged.unread
    assert evaluation.controls[CENTRE]["le"].count == samples


def test_a_data_file_that_is_damaged_in_one_run_counts_for_none(runs: list[Made]) -> None:
    path = runs[1].data(1)
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    evaluation = judge(runs)
    check_same_samples(evaluation, 10)
    assert len(rows_of(runs[0])) == 15  # measured, for the time when the other run is mended
    assert [list(judged.unread) for judged in evaluation.runs] == [[PART], [PART]]
    assert f"{path} cannot be read" in evaluation.unread[PART]
    assert f"left out: 1 shard that could not be read, the first {PART}" in list(remarks(evaluation))
    path.write_bytes(whole)
    mended = judge(runs)
    check_same_samples(mended, 15)
    assert not mended.unread


def test_a_data_file_that_is_gone_counts_for_none_also_if_it_was_measured(runs: list[Made]) -> None:
    judge(runs)
    path = runs[1].data(1)
    whole = path.read_bytes()
    for state, said in (
        (None, "is missing"),
        (whole[:-1], f"has {len(whole) - 1} bytes, its receipt says {len(whole)}"),
    ):
        path.unlink() if state is None else path.write_bytes(state)
        evaluation = judge(runs)
        check_same_samples(evaluation, 10)
        assert evaluation.unread == {PART: f"{path} {said}; repeat the `saltern extract` command"}
    path.write_bytes(whole)
    check_same_samples(judge(runs), 15)


def test_a_shard_that_one_family_cannot_read_counts_for_none(runs: list[Made]) -> None:
    judge(runs)
    Path(runs[1].run.shards[1].url).unlink()
    check_same_samples(judge(runs), 15)  # measured before
    evaluation = judge(runs, metrics=["le", "max-box-acc"])
    check_same_samples(evaluation, 10)
    counts = [judged.estimates["max_box_acc"].count for judged in evaluation.runs]
    assert [*counts, evaluation.controls[CENTRE]["max_box_acc"].count] == [10, 10, 10]


def test_a_damaged_result_is_named_with_the_fix(runs: list[Made]) -> None:
    expected = judge(runs).runs[1].estimates
    folder = runs[1].path / "metrics/localization"
    path = folder / f"data/{PART}.parquet"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=rf"{path} is not what was written: its digest differs; remove {folder} and"):
        judge(runs)
    shutil.rmtree(folder)
    assert judge(runs).runs[1].estimates == expected


def test_a_refused_evaluation_changes_no_summary(runs: list[Made]) -> None:
    judge(runs)
    path = runs[0].path / "metrics/localization.json"
    before = path.read_bytes()
    path.write_text("{}")
    with pytest.raises(UserError, match="none of the 15 samples has a pixel mask"):
        judge(runs, metrics=["le", "pxap"])
    assert path.read_text() == "{}"
    judge(runs)
    assert path.read_bytes() == before


def test_a_shard_that_failed_in_one_run_counts_for_none_if_the_caller_says_so(runs: list[Made]) -> None:
    store = Store(str(runs[1].path))
    store.remove([receipt_name(PART)])
    with pytest.raises(UserError, match="not complete: it lacks 1 of 3 shards, 5 samples"):
        judge(runs, skip_failed=True)  # nobody has tried it
    store.write(failure_name(PART), Failure(PART, "data", "its tar is cut", 1).to_json())
    with pytest.raises(UserError, match="not complete"):
        judge(runs)
    evaluation = judge(runs, skip_failed=True)
    check_same_samples(evaluation, 10)
    assert evaluation.unread == {PART: "data: its tar is cut"}
    assert len(rows_of_shards(runs[0])) == 2  # no time is spent on it
    for number in (0, 2):
        name = runs[0].run.shards[number].name
        store.remove([receipt_name(name)])
        store.write(failure_name(name), Failure(name, "data", "its tar is cut", 1).to_json())
    with pytest.raises(UserError, match="all shards failed, as part0/train: data: its tar is cut; repair them"):
        judge(runs, skip_failed=True)


def rows_of_shards(made: Made) -> list[Path]:
    return list((made.path / "metrics/localization/data").rglob("*.parquet"))


def test_shards_are_matched_by_name_or_else_by_their_tars() -> None:
    named = [Shard("a/x", "/one/a/x.tar", 5), Shard("b/x", "/one/b/x.tar", 5), Shard("b/y", "/one/b/y.tar", 5)]
    lost = [{"a/x": "cut"}, {}]
    assert left_out([named, named], lost) == [{"a/x": "cut"}, {"a/x": "cut"}]
    others = [Shard(f"data/{shard.name}", f"s3://two/data/{shard.name}.tar", 5) for shard in named]
    both = {"a/x": "cut", "b/x": "cut"}  # nothing tells these two apart
    assert left_out([named, others], lost) == [both, {f"data/{name}": why for name, why in both.items()}]
    assert left_out([named, others], [{}, {}]) == [{}, {}]
