"""Pages sort by what the run's metrics found, the worst first, and say how the run did."""

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from counted import use_counted
from judging import alter, judge, rows_of
from made_run import Made, make_run
from naive_metrics import inclusive
from pages import Page, page_of

from saltern.pipeline.runs.reader import open_run
from saltern.pipeline.show.sheet import comparison, contact_sheet
from saltern.schemas.errors import UserError
from saltern.schemas.metrics import METRICS


def measured_run(folder: Path, *, targets: int = 1, **changes: object) -> Made:
    folder.mkdir(exist_ok=True)
    made = make_run(folder, targets=targets, json=inclusive((5, 5, 40, 40)), **changes)  # type: ignore[arg-type]
    judge(made.path)
    return made


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a run with metrics and a failed row, which no test changes."""
    return measured_run(tmp_path_factory.mktemp("measured"), broken=((1, 2),))


def naive_order(made: Made, name: str, sign: int) -> list[str]:
    """Return the keys by a metric from the data files; rows without a value last, equals in page order."""
    found = {row["key"]: row[name] for row in rows_of(made)}
    value = {key: math.inf if value is None else sign * value for key, value in found.items()}
    return sorted(value, key=lambda key: value[key])


@pytest.mark.slow
@pytest.mark.parametrize(("sort", "name", "sign"), [("le", "le", -1), ("f1", "f1", 1), ("box-iou", "box_iou", 1)])
def test_sorted_by_a_metric_the_worst_of_the_whole_run_come_first(
    measured: Made, sort: str, name: str, sign: int
) -> None:
    made = measured
    expected = naive_order(made, name, sign)
    page = page_of(made, sort, limit=6)
    assert [card.key for card in page.cards] == expected[:6]
    assert {key[:2] for key in expected[:6]} > {"s0"}  # not of the first shard alone
    title = METRICS["localization"][name].title
    assert f"sorted by {title}, worst first, rows without a value last" in page.head
    assert [card.key for card in page_of(made, name).cards] == expected


def test_the_reader_sorts_by_each_metric_worst_first(measured: Made) -> None:
    text = contact_sheet(open_run(str(measured.path)))
    buttons = {
        title: (by, int(sign))
        for by, sign, title in re.findall(r'data-by="(v\d+)" data-sign="(-?1)"[^>]*>([^<]+)</button>', text)
    }
    assert {"score", "LE %", "F1 %", "box IoU %"} <= buttons.keys()
    assert buttons["LE %"][1] == -1
    assert {buttons[title][1] for title in ("score", "F1 %", "box IoU %")} == {1}
    stored = {row["key"]: row for row in rows_of(measured)}
    for card in Page(text).cards:
        assert float(card.attributes[f"data-{buttons['F1 %'][0]}"] or "") == pytest.approx(
            100 * stored[card.key]["f1"], rel=1e-4
        )
        assert f"F1 % {100 * stored[card.key]['f1']:.3g}" in " ".join(card.text.split())
        assert "difficult" not in card.text  # no sample has a value


@pytest.mark.slow
def test_the_header_has_the_means_with_their_intervals(tmp_path: Path) -> None:
    made = measured_run(tmp_path)
    own = json.loads((made.path / "metrics/localization.json").read_text())["metrics"]["le"]
    ends = " ".join(f"{100 * own[end]:.3g}" for end in ("value", "low", "high")).split()
    assert f"LE % {ends[0]} ({ends[1]} to {ends[2]}) of 15" in page_of(made).head
    (made.path / "metrics/localization.json").write_text("{")
    page = page_of(made)
    assert "LE % " + ends[0] not in page.head
    assert "LE %" in page.head  # the buttons stay


@pytest.mark.slow
def test_only_the_first_target_of_a_sample_has_metrics(tmp_path: Path) -> None:
    made = measured_run(tmp_path, targets=2)
    page = page_of(made, "f1")
    assert [card.key for card in page.cards[:15]] == naive_order(made, "f1", 1)
    places = [next(at for at, card in enumerate(page.cards) if card.key == key) for key in naive_order(made, "f1", 1)]
    assert places == list(range(15))


@pytest.mark.slow
def test_metrics_of_maps_that_were_made_again_are_not_shown(tmp_path: Path) -> None:
    made = measured_run(tmp_path)
    assert "LE %" in page_of(made).head
    alter(made, score=0.25)  # other data files: the metrics are not of these
    page = page_of(made)
    assert "LE %" not in page.head
    with pytest.raises(UserError, match=r"--sort 'le' .*score.*saltern evaluate .* measures"):
        contact_sheet(open_run(str(made.path)), "le")


def test_a_metric_that_is_not_measured_names_the_command(measured: Made) -> None:
    with pytest.raises(UserError, match=r"--sort 'road' .*box-iou.*saltern evaluate .*--metric NAME") as refused:
        contact_sheet(open_run(str(measured.path)), "road")
    assert "pointing-difficult" not in str(refused.value)  # no sample has a value


def test_a_metric_that_older_files_lack_has_no_values(tmp_path: Path) -> None:
    made = measured_run(tmp_path, shards=1)
    file = made.path / "metrics/localization/data/part0/train.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["box_iou"]), file)
    page = page_of(made)
    assert len(page.cards) == 5
    assert "box IoU %" not in page.cards[0].text
    assert "LE %" in page.cards[0].text


@pytest.mark.slow
def test_several_runs_have_the_means_of_the_metrics_that_all_have(tmp_path: Path) -> None:
    one, other = (
        measured_run(tmp_path / "a", method="cam"),
        measured_run(tmp_path / "b", method="gradient", grid=(8, 8)),
    )
    judge(one.path, metrics=["statistics"])
    text = comparison([open_run(str(one.path)), open_run(str(other.path))])
    page = Page(text)
    assert "An image's metrics are means over the runs." in page.head
    assert "LE %" in page.head
    assert "entropy" not in page.head
    each = [{row["key"]: row["f1"] for row in rows_of(made)} for made in (one, other)]
    for card in page.cards:
        mean = 50 * (each[0][card.key] + each[1][card.key])
        assert f"F1 % {mean:.3g}" in " ".join(card.text.split())
    worst = comparison([open_run(str(one.path)), open_run(str(other.path))], "f1", 3)
    assert [card.key for card in Page(worst).cards] == naive_order(one, "f1", 1)[:3]


def test_a_page_reads_the_results_of_the_shards_that_it_shows(measured: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(str(measured.path))
    store = use_counted(monkeypatch)
    page = Page(comparison([run], chosen=("the last", [14])))
    assert [card.key for card in page.cards] == ["s2k4"]
    assert "LE %" in page.cards[0].text
    opened = {path.partition("/metrics/localization/")[2]: count for path, count in store.opened.items()}
    del opened[""]  # other files
    assert opened == {
        "run.json": 1,
        "receipts/part0/train.json": 1,  # tells that the run was measured
        "receipts/part2/train.json": 1,
        "data/part2/train.parquet": 1,
    }
