"""Evaluations of moved, changed and broken shards, of several runs, and the command."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judging import BLANK, alter, annotate, found_of, judge
from made_run import CROP, SIZE, make_run
from making import picture, write_tar
from naive_metrics import HEIGHT, WIDTH, inclusive
from numpy.typing import NDArray
from pages import members
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine import driver
from saltern.pipeline.metrics.faithfulness.maps import StatisticsFamily
from saltern.pipeline.metrics.localization.levels import LEVELS
from saltern.pipeline.metrics.localization.maxbox import box_hits
from saltern.pipeline.metrics.table import remarks
from saltern.pipeline.runs.manifest import receipt_name
from saltern.pipeline.runs.reader import Row, open_run
from saltern.schemas import evaluation
from saltern.schemas.errors import UserError

pytestmark = pytest.mark.slow

COLUMNS = ("le", "om", "f1", "f1_mask", "pointing", "pointing_difficult", "energy", "box_iou")


@pytest.mark.slow
def test_shards_that_were_moved_or_are_some_of_the_runs(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    everything = found_of(made.path)
    moved = tmp_path / "elsewhere"
    (tmp_path / "shards").rename(moved)
    assert found_of(made.path, [str(moved)]) == everything
    judged = judge(made.path, [str(moved / "part1")]).runs[0]
    assert judged.census.judged == 5
    assert judged.notes[-1].startswith("1 of the run's 3 shards are evaluated: RUN/metrics")
    assert found_of(made.path, [str(moved)]) == everything


def test_a_tar_of_another_size_is_not_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BACKOFF_S", (0.01, 0.02))
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    tar = Path(made.run.shards[1].url)
    elsewhere = tmp_path / "elsewhere/part1/train.tar"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UserError, match="is not a shard of"):
        judge(made.path, [str(elsewhere)])
    tar.write_bytes(tar.read_bytes() + bytes(512))  # the tar changed after the run
    evaluation = judge(made.path, [str(tmp_path / "shards")])
    assert evaluation.runs[0].census.judged == 10
    assert "changed since it was listed" in evaluation.unread["part1/train"]


def test_wrong_calls(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=BLANK)
    with pytest.raises(UserError, match="'iou' is not one of localization, "):
        judge(made.path, metrics=["le,iou"])
    for words in ("", "le,", "le,,f1"):
        with pytest.raises(UserError, match=f"--metric '{words}': a name is empty"):
            judge(made.path, metrics=[words])
    with pytest.raises(UserError, match=rf"{made.path}: none of the 15 samples has boxes to judge by .*pack --boxes"):
        judge(made.path)
    other = write_tar(tmp_path / "other.tar", [("a", {"jpg": picture(0)})])
    with pytest.raises(UserError, match=r"other.tar .* is not a shard of"):
        judge(made.path, [str(tmp_path / "shards"), str(other)])
    (tmp_path / "copy/part1").mkdir(parents=True)
    (tmp_path / "copy/part1/train.tar").write_bytes(Path(made.run.shards[1].url).read_bytes())
    with pytest.raises(UserError, match="both the run's part1/train"):
        judge(made.path, [str(tmp_path / "shards"), str(tmp_path / "copy")])
    (made.path / receipt_name("part1/train")).unlink()
    with pytest.raises(UserError, match="not complete: it lacks 1 of 3 shards, 5 samples"):
        judge(made.path)
    with pytest.raises(UserError, match="holds no run"):
        judge(tmp_path)


def test_a_run_without_samples_is_named(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=0, json=BLANK)
    with pytest.raises(UserError, match=f"{made.path}: no sample to judge"):
        judge(made.path)


def test_an_evaluation_that_is_damaged_is_answered_with_the_fix(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    judge(made.path)
    folder = made.path / "metrics/localization"
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=rf"run.json is damaged .*; remove {folder}.* and repeat"):
        judge(made.path)


def test_a_run_on_other_samples_is_named(tmp_path: Path) -> None:
    box = inclusive((10, 10, 40, 40))
    one, same, other = (
        make_run(tmp_path / name, json=box, method=name, shards=shards)
        for name, shards in (("grad-cam", 2), ("cam", 2), ("layer-cam", 3))
    )
    ended = call(one.path, same.path, other.path, "--metric", "le")
    assert ended.exit_code == 0
    assert f"{other.path} was judged on other samples than {one.path}" in ended.stderr
    assert f"{same.path} was judged" not in ended.stderr


def test_a_run_that_cannot_be_written_to(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    (made.path / "metrics").write_bytes(b"in the way")
    with pytest.raises(UserError, match=r"run/metrics is a file, where a folder should be"):
        judge(made.path)


def test_shards_beyond_the_limit_of_a_run_are_skipped(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)), limit=15)
    write_tar(tmp_path / "shards/part9/train.tar", [("a", {"jpg": picture(0)})])
    judged = judge(made.path, [str(tmp_path / "shards")]).runs[0]
    assert judged.census.judged == 15
    assert "1 shards are beyond the --limit of the run and are skipped" in judged.notes


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    tars = [shard.url for shard in made.run.shards]
    ended = call(made.path, "--shards", *tars, "--metric", "le,f1", "--format", "markdown")
    assert ended.exit_code == 0
    head, _, *rows = ended.stdout.splitlines()
    assert head.replace(" ", "") == "||LE%↓|F1%↑|"
    assert [row.split("|")[1].strip() for row in rows] == [
        "grad-cam of resnet18", "random map", "blob in the centre", "edge filter", "centre box of half the area",
        "whole image",
    ]  # fmt: skip
    as_json = json.loads(call(made.path, "--format", "json", "--metric", "localization").stdout)
    assert as_json["controls"]["whole-image"]["le"]["value"] == 1
    assert as_json["runs"][0]["metrics"].keys() == set(COLUMNS)
    assert as_json["better"]["le"] == "less"
    assert f"{100 * as_json['runs'][0]['metrics']['f1']['value']:.1f} ±" in rows[0]
    lines = call(made.path, "--format", "csv", "--metric", "le").stdout.splitlines()
    assert lines[0] == "name,metric,better,value,low,high,count,std"
    assert len(lines) == 7
    assert isinstance(call(made.path, "--metric", "f2").exception, UserError)


@pytest.mark.slow
def test_all_forms_of_a_table_say_the_same(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    words = ("le", "pointing-difficult", "total-variation")  # the second has no values here
    ended = {
        form: call(made.path, "--metric", ",".join(words), "--format", form) for form in ("markdown", "csv", "json")
    }
    lines = ended["markdown"].stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    as_json = json.loads(ended["json"].stdout)
    subjects = [as_json["runs"][0]["metrics"], *as_json["controls"].values()]
    read = list(csv.DictReader(ended["csv"].stdout.splitlines()))
    assert [row["name"] for row in read[::3]] == [row[0] for row in cells[1:]]
    assert read[0]["name"] == as_json["runs"][0]["name"] == "grad-cam of resnet18"
    for row, found, in_csv in zip(cells[1:], subjects, zip(*[iter(read)] * 3, strict=True), strict=True):
        assert [line["metric"] for line in in_csv] == list(words)
        assert [line["better"] for line in in_csv] == list(as_json["better"].values()) == ["less", "more", "neither"]
        cell_of = dict(zip((words[0], words[2]), row[1:], strict=True))
        for word, line in zip(words, in_csv, strict=True):
            own = found[word.replace("-", "_")] or {"count": 0}
            assert (own["count"] > 0) == (word in cell_of)  # columns without values are left out
            assert {
                name: str(own.get(name, "")) for name in ("value", "low", "high", "count", "std")
            }.items() <= line.items()
            scale, digits = (1, 3) if word == "total-variation" else (100, 1)
            if word in cell_of:
                half = (own["high"] - own["low"]) / 2
                assert cell_of[word] == f"{scale * own['value']:.{digits}f} ± {scale * half:.{digits}f}"
    # How the numbers were computed is told with each.
    assert len(as_json["remarks"]) > 1
    for found in ended.values():
        assert found.stderr.splitlines()[-len(as_json["remarks"]) :] == as_json["remarks"]


def test_boxes_at_every_threshold_have_a_family(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, broken=((0, 1),), json=inclusive((0, 0, WIDTH, HEIGHT)))
    evaluation = judge(made.path, metrics=["max-box"])
    assert any("an oracle's choice" in line for line in remarks(evaluation))
    found = evaluation.runs[0].estimates
    hits_N = [box_hits_of(row) for row in open_run(str(made.path))]
    assert found["max_box_acc"].value == pytest.approx(max(np.mean(hits_N, 0)[0]))
    assert found["max_box_acc_v2"].value == pytest.approx(np.mean(hits_N, 0)[1:].max(1).mean())
    assert found["max_box_acc"].count == 5
    assert evaluation.controls["whole-image"]["max_box_acc"].value == 0  # clovaai's convention for a constant map


def box_hits_of(row: Row) -> NDArray[np.bool_]:
    """Return at which levels the boxes of a row hit the whole image, (4, levels)."""
    if row.map_bytes is None:
        return np.zeros((4, LEVELS), bool)
    geometry, size = np.array([row.geometry]), np.array([SIZE], np.int32)
    (hits,) = box_hits(row.map()[None], (CROP, CROP), geometry, size, [[(0, 0, WIDTH, HEIGHT)]])
    return np.unpackbits(hits, axis=1, count=LEVELS).astype(bool)


@pytest.mark.slow
def test_several_runs_share_a_table_and_the_controls(tmp_path: Path) -> None:
    box = inclusive((10, 10, 40, 40))
    one, other = (make_run(tmp_path / name, json=box, method=name) for name in ("grad-cam", "cam"))
    ended = call(one.path, other.path, "--metric", "le,tv", "--format", "json")
    assert isinstance(ended.exception, UserError)
    ended = call(one.path, other.path, "--metric", "le,total-variation", "--format", "json")
    made = json.loads(ended.stdout)
    assert [run["method"] for run in made["runs"]] == ["grad-cam", "cam"]
    assert made["runs"][0]["metrics"].keys() == {"le", "total_variation"}
    assert list(made["controls"]) == ["random", "centre-blob", "edges", "centre-box", "whole-image"]
    assert made["controls"]["whole-image"]["total_variation"]["value"] == 0
    assert not (other.path / "metrics/localization-controls").exists()
    text = call(one.path, one.path, "--metric", "le").stdout
    assert f"grad-cam of resnet18 ({one.path})" in text


@pytest.mark.slow
def test_a_repeated_command_judges_only_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    before = found_of(made.path)
    (made.path / "metrics/localization/receipts/part1/train.json").unlink()
    capsys.readouterr()
    assert found_of(made.path) == before
    assert "2 of 3 shards done, 1 to do" in capsys.readouterr().err
    alter_box = [[0, 0, 1, 1]]
    alter(made, boxes=alter_box)  # the run was done again: its data files and receipts are others
    assert found_of(made.path)["le"].value == 1


def test_a_tar_that_was_touched_is_judged_again_only_if_it_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path, shards=1, json=BLANK)
    alter(made, boxes=[[5, 5, 6, 7]])
    annotate(made, lambda key: b'{"boxes": [[5, 5, 5, 6]]}')
    tar, data = Path(made.run.shards[0].url), made.path / "metrics/localization/data/part0/train.parquet"

    def look(mtime_s: int) -> float:
        os.utime(tar, (mtime_s, mtime_s))
        made.run = replace(made.run, shards=[replace(made.run.shards[0], mtime_ns=mtime_s * 10**9)])
        (made.path / "run.json").write_bytes(made.run.to_json())
        return found_of(made.path)["le"].value

    assert look(1000) == 0
    inode = data.stat().st_ino
    assert look(2000) == 0
    assert data.stat().st_ino == inode
    annotate(made, lambda key: b'{"boxes": [[5, 5, 6, 7]]}')
    assert look(3000) == 1


def test_an_evaluation_with_other_columns_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    with monkeypatch.context() as older:
        older.setitem(evaluation.FIELDS, "statistics", evaluation.FIELDS["statistics"][:-1])
        older.setattr(StatisticsFamily, "metrics", {"entropy": StatisticsFamily.metrics["entropy"]})
        judge(made.path, metrics=["statistics"])
    found = judge(made.path, metrics=["statistics"]).runs[0].estimates
    assert found["mask_area"].count == 5


@pytest.mark.slow
def test_an_evaluation_of_another_run_in_the_folder_is_replaced(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    judge(made.path)
    again = replace(made.run.config, seed=3)
    (made.path / "run.json").write_bytes(replace(made.run, config=again, fingerprint=again.fingerprint()).to_json())
    made.run = replace(made.run, config=again, fingerprint=again.fingerprint())
    alter(made, boxes=[[0, 0, 1, 1]])
    assert found_of(made.path)["le"].value == 1


def test_a_shard_that_cannot_be_read_is_listed_and_counts_for_nothing(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    raw = bytearray(made.data(1).read_bytes())
    raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
    made.data(1).write_bytes(raw)
    ended = call(made.path, "--format", "json", "--metric", "le")
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)["runs"][0]
    assert found["samples"] == 10
    assert list(found["unread_shards"]) == ["part1/train"]
    assert "part1/train: " in ended.stderr


@pytest.mark.slow
def test_om_of_labels_that_are_not_the_model_s_is_said_to_tell_nothing(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=12, samples=5, target="top1", json=members())
    notes = judge(made.path).runs[0].notes  # the helper's top-1 is never the label
    assert [note.partition(":")[0] for note in notes] == ["OM tells nothing here"]
    assert "in 0 of 60 samples" in notes[0]
    assert judge(made.path, metrics=["le"]).runs[0].notes == []
