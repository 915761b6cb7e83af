"""The comparison shows the maps of several runs side by side."""

from pathlib import Path

import numpy as np
import pytest
from made_run import Made, make_run
from pages import Page, members, page_of

from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.show.order import spread
from saltern.pipeline.show.sheet import comparison
from saltern.schemas.errors import UserError


def run_of(folder: Path, method: str, **changes: object) -> Made:
    """Make a run of another method over the same samples."""
    (folder / method).mkdir()
    return make_run(folder / method, method=method, **changes)  # type: ignore[arg-type]


def wide(*made: Made, sort: str | None = None, limit: int = 48) -> Page:
    return Page(comparison([open_run(str(one.path)) for one in made], sort, limit))


def test_several_runs_are_shown_side_by_side(tmp_path: Path) -> None:
    first = run_of(tmp_path, "grad-cam", json=members())
    second = run_of(tmp_path, "gradient", grid=(32, 32), broken=((0, 1),))
    third = run_of(tmp_path, "cam", save_map=False)
    page = wide(first, second, third, limit=4)
    assert [card.key for card in page.cards] == ["s0k0", "s0k1", "s0k2", "s0k3"]
    for card in page.cards:
        assert card.text.split().index("photograph") < card.text.split().index("gradient")
        assert len(card.images) == (3 if card.key == "s0k1" else 4)
    assert "decode_failed" in page.cards[1].text or "no image" in page.cards[1].text
    assert [str(image["alt"]) for image in page.cards[0].images[1:]] == [
        "grad-cam of s0k0", "gradient of s0k0", "cam of s0k0",
    ]  # fmt: skip
    # The first run's overlay equals the one on its own page.
    single = page_of(first, limit=1)
    assert np.array_equal(page.cards[0].pixels(1), single.cards[0].pixels(1))
    assert "4 of 15 rows" in page.head
    assert second.run.fingerprint in page.head
    assert "shorter side 40, crop 32" in page.head  # what all runs share
    assert "weights none" in page.head
    assert "15 ok" not in page.head  # only of two of them


def test_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    made = [make_run(folder, shards=1, layer=[f"layer{number}"]) for number, folder in enumerate(folders)]
    page = wide(*made)
    assert all(f"grad-cam layer{number}" in page.cards[0].text for number in range(3))
    with pytest.raises(UserError, match="given twice"):
        wide(made[0], made[0])


def test_runs_of_one_method_are_told_apart_by_their_targets(tmp_path: Path) -> None:
    targets = ("top1", "class:1")
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    made = [make_run(tmp_path / str(at), shards=1, target=target) for at, target in enumerate(targets)]
    page = wide(*made)
    for target in targets:
        assert f"grad-cam {target}" in page.cards[0].text
        assert f"target {target}" in page.head


def test_a_sample_that_a_run_lacks_leaves_a_gap(tmp_path: Path) -> None:
    page = wide(run_of(tmp_path, "cam", shards=2), run_of(tmp_path, "grad-cam", shards=1))
    assert "not in this run" not in page.cards[0].text
    assert "not in this run" in page.cards[5].text


@pytest.mark.slow
def test_runs_that_share_no_sample(tmp_path: Path) -> None:
    one, other = run_of(tmp_path, "cam"), run_of(tmp_path, "grad-cam", shards=0)
    with pytest.raises(UserError, match=r"cam/run shares no sample with .*grad-cam/run"):
        wide(one, other)


def test_rows_of_the_same_target_are_put_side_by_side(tmp_path: Path) -> None:
    page = wide(run_of(tmp_path, "cam", targets=2, shards=1), run_of(tmp_path, "grad-cam", targets=3, shards=1))
    assert [card.key for card in page.cards[:2]] == ["s0k0", "s0k0"]
    assert not np.array_equal(page.cards[0].pixels(2), page.cards[1].pixels(2))


def test_rows_are_drawn_over_all_shards_by_a_seed(tmp_path: Path) -> None:
    made = run_of(tmp_path, "cam", shards=4, broken=((0, 1),))
    run = open_run(str(made.path))
    words, numbers = spread(run, 4, seed=0)
    assert [run.at(number).shard for number in numbers] == [shard.name for shard in run.shards]
    assert words == "a random one of each of 4 equal parts of the shards (seed 0)"
    assert spread(run, 4, seed=0) == (words, numbers)
    drawn = {tuple(spread(run, 4, seed)[1]) for seed in range(40)}
    assert len(drawn) > 30
    assert {number for one in drawn for number in one} == set(range(20))  # each row has a chance
    halves = [[number // 10 for number in spread(run, 2, seed)[1]] for seed in range(20)]
    assert halves == [[0, 1]] * 20
    without = {number for seed in range(60) for number in spread(run, 3, seed, {made.run.shards[1].name})[1]}
    assert without == {*range(5), *range(10, 20)}
    assert spread(run, 20, 0)[1] == list(range(20))
    assert spread(run, 48, 0, {shard.name for shard in run.shards}) == ("all that were judged", [])


def test_the_page_says_how_its_images_were_chosen(tmp_path: Path) -> None:
    runs = [open_run(str(run_of(tmp_path, name, shards=2).path)) for name in ("cam", "grad-cam")]
    page = Page(comparison(runs, chosen=("drawn by lot", [7, 2])))
    assert [card.key for card in page.cards] == ["s1k2", "s0k2"]
    assert "2 of 10 rows, drawn by lot" in page.head
