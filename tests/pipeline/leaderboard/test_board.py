"""A leaderboard extracts and judges what is missing, compares only equals, and its page holds the table."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from extracting import REQUEST, extract
from making import HELPERS, TINY, picture, write_tar
from naive_metrics import inclusive
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.leaderboard.board import Leaderboard, make_leaderboard
from saltern.pipeline.metrics.evaluate import EvaluateRequest, to_json
from saltern.pipeline.metrics.table import lines_of
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import CONTROLS

pytestmark = pytest.mark.slow

METRICS = ["le,f1,average-drop"]


def write_shards(folder: Path) -> Path:
    for shard in range(2):
        members = [(f"k{shard}{at}", picture(3 * shard + at, 44, 60)) for at in range(3)]
        box = inclusive((5, 5, 40, 40))
        write_tar(folder / f"in/{shard}.tar", [(key, {"jpg": image, "json": box}) for key, image in members])
    return folder / "in"


def board(shards: Path, out: Path, methods: str, *runs: Path, shown: int = 3) -> Leaderboard:
    request = replace(REQUEST, shards=[str(shards)], method=methods, target="top1", torch_threads=1)
    judging = EvaluateRequest([], metrics=METRICS, torch_threads=1)
    options = RunOptions(str(out), engine="local", device="cpu")
    return make_leaderboard(request, [str(run) for run in runs], judging, options, shown)


def test_missing_runs_are_extracted_and_all_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path)
    assert extract(shards, tmp_path / "own", target="top1", method="gradient", layer=None) == 0
    made = board(shards, tmp_path / "board", "cam,grad-cam", tmp_path / "own")
    found = json.loads((tmp_path / "board/leaderboard.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["cam", "grad-cam", "gradient"]
    assert [run["samples"] for run in found["runs"]] == [6, 6, 6]
    assert set(found["controls"]) == set(CONTROLS)
    smooth = {"total_variation": "neither", "entropy": "neither"}  # which every table of faithfulness has
    assert found["better"] == {"le": "less", "f1": "more", **smooth, "average_drop": "less"}
    for run in found["runs"]:
        assert run["metrics"].keys() == found["better"].keys()
        assert 0 < run["images_per_second"] < math.inf
    table = (tmp_path / "board/leaderboard.md").read_text()
    assert table.startswith("| ")
    assert made.markdown() in table
    assert re.search(r"^\| gradient of making:tiny +\| .* [\d,]+\.\d +\|$", table, re.M)
    capsys.readouterr()
    board(shards, tmp_path / "board", "cam,grad-cam", tmp_path / "own")  # nothing is done again
    said = capsys.readouterr().err
    assert said.count("nothing to do") == 1 + 3 * 3 + 3  # the extraction, three families of three runs, their controls


def test_the_page_has_the_table_and_images_under_all_methods(tmp_path: Path) -> None:
    made = board(write_shards(tmp_path), tmp_path / "board", "cam,eigen-cam", shown=2)
    page = (tmp_path / "board/leaderboard.html").read_text()
    assert page.count("<article") == 2
    rows = re.findall(r"<tr>(<td.*?)</tr>", page)
    assert len(rows) == 2 + len(CONTROLS)
    names = [re.search(r"<td>(.*?)</td>", row)[1] for row in rows]  # type: ignore[index]
    assert names[:2] == ["cam of making:tiny", "eigen-cam of making:tiny"]
    best = min(judged.estimates["average_drop"].value for judged in made.evaluation.runs)
    assert f'data-value="{best:.8g}" class="best"' in page
    assert page.count('class="best"') >= 3
    assert re.search(r'data-sign="-1"[^>]*>LE %</button>', page)
    assert page.count("<image ") == 2 * 3  # each photograph is stored once, and a small map for each method
    assert "src=http" not in page


def test_a_run_that_is_named_again_is_refused_before_it_is_judged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="board/cam is given twice"):
        board(write_shards(tmp_path), tmp_path / "board", "cam", tmp_path / "board/cam")
    assert not (tmp_path / "board/cam/metrics").exists()


def test_one_method_has_its_folder_too(tmp_path: Path) -> None:
    board(write_shards(tmp_path), tmp_path / "board", "cam")
    assert (tmp_path / "board/cam/run.json").exists()


def test_runs_of_other_shards_are_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    assert extract(shards / "0.tar", tmp_path / "own", target="top1") == 0
    with pytest.raises(UserError, match="not of the same shards"):
        board(shards, tmp_path / "board", "cam", tmp_path / "own")
    assert not (tmp_path / "board/leaderboard.json").exists()
    assert not (tmp_path / "board/cam/metrics").exists()  # refused before the runs are judged


def test_a_failed_shard_counts_for_no_method_and_the_same_command_adds_it_later(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    tar = shards / "1.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700])
    assert extract(shards, tmp_path / "own", target="top1", method="gradient", layer=None) == 1
    wanted = shards, tmp_path / "board", "cam,grad-cam", tmp_path / "own"
    made = board(*wanted)
    assert list(made.evaluation.unread) == ["1"]
    assert made.evaluation.unread["1"].startswith("data: ")
    found = json.loads((tmp_path / "board/leaderboard.json").read_text())
    assert [(run["samples"], list(run["unread_shards"])) for run in found["runs"]] == [(3, ["1"])] * 3
    assert {own["le"]["count"] for own in found["controls"].values()} == {3}
    for name in ("leaderboard.md", "leaderboard.html"):
        assert "left out: 1 shard that could not be read, the first 1" in (tmp_path / "board" / name).read_text()
    tar.write_bytes(whole)
    assert extract(shards, tmp_path / "own", target="top1", method="gradient", layer=None) == 0
    mended = board(*wanted)
    assert not mended.evaluation.unread
    fresh = board(shards, tmp_path / "fresh", "cam,grad-cam", tmp_path / "own")
    tables = [[to_json(found) for _, found in lines_of(one.evaluation)] for one in (mended, fresh)]
    assert tables[0] == tables[1]


def test_a_leaderboard_without_any_good_shard_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    for tar in shards.iterdir():
        tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"all shards failed, as 0: data: .*repair"):
        board(shards, tmp_path / "board", "cam")
    assert not (tmp_path / "board/leaderboard.json").exists()


def test_the_exit_code_tells_of_a_failed_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)
    shards = write_shards(tmp_path)
    (shards / "1.tar").write_bytes((shards / "1.tar").read_bytes()[:700])
    words = [*TINY, "--method", "cam", "--target", "top1", "--metric", "le", "--engine", "local"]
    ended = CliRunner().invoke(app, ["leaderboard", str(shards), *words, "--out", str(tmp_path / "board")])
    assert ended.exit_code == 1
    assert ended.stdout.startswith("| ")
    assert "\n1: data: " in ended.stderr
