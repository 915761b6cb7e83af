"""Evaluations of made runs equal loops over pixels, for all kinds of rows, shards and annotations."""

import json
import math
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_run import CROP, SIZE, Made, make_run, write_shard
from making import picture, write_tar
from naive_metrics import HEIGHT, WIDTH, filled, inclusive, naive_f1, naive_iou, naive_mask, some_box
from naive_rows import original_box
from pages import members
from typer.testing import CliRunner

from saltern.jobs.main import app
from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.metrics.evaluate import evaluate
from saltern.pipeline.metrics.judge import COLUMNS
from saltern.pipeline.metrics.localization.boxes import centre_box
from saltern.pipeline.metrics.table import as_table, remarks
from saltern.pipeline.runs.manifest import receipt_name
from saltern.pipeline.runs.reader import map_in_original, open_run
from saltern.schemas.errors import UserError
from saltern.schemas.saliency import ZERO_MAP


def annotate(made: Made, boxes: Callable[[str], bytes | None], samples: int = 5) -> None:
    """Replace the tars by ones of the same size, with another json member for each key."""
    for number, shard in enumerate(made.run.shards):
        members: dict[str, dict[str, bytes]] = {}
        for index in range(samples):
            key = f"s{number}k{index}"
            content = boxes(key)
            members[key] = {"jpg": picture(index, *SIZE), "cls": str(index).encode()}
            members[key] |= {} if content is None else {"json": content.ljust(200)}
        write_tar(Path(shard.url), members.items())
        with Path(shard.url).open("ab") as tar:
            tar.write(bytes(shard.size - Path(shard.url).stat().st_size))


def rows_of(made: Made) -> list[dict[str, Any]]:
    return [
        row
        for shard in made.run.shards
        for row in pq.read_table(made.path / f"metrics/localization/{shard.name}.parquet").to_pylist()
    ]


def alter(made: Made, **changed: Any) -> None:
    """Replace values in some columns of all data files; a value can be a function of the row's key."""
    for number, shard in enumerate(made.run.shards):
        table = pq.read_table(made.data(number))
        rows = []
        for row in table.to_pylist():
            row |= {name: value(row["key"]) if callable(value) else value for name, value in changed.items()}
            rows.append(row)
        assert shard.name == table["shard"][0].as_py()
        write_shard(made, number, len({row["key"] for row in rows}), rows, (4, 4))


BLANK = b'{"boxes": []}'.ljust(200)


def test_every_number_is_that_of_the_naive_loops(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, json=BLANK)
    # Half of the predictions are right, so that LE and OM differ.
    alter(made, predicted=lambda key: int(key[-1]) // 2 * 2)
    draw, true = random.Random(3), {}
    for row in open_run(str(made.path)):
        near = tuple(edge + draw.choice((0, 1)) for edge in row.boxes[0])  # some hits among the misses
        true[row.key] = [some_box(draw) for _ in range(draw.randint(1, 3))] + [near] * draw.randint(0, 1)
    annotate(made, lambda key: inclusive(*true[key]))
    found = evaluate(str(made.path))
    kept = rows_of(made)
    assert [row["key"] for row in kept] == list(true)
    for row, stored in zip(kept, open_run(str(made.path)), strict=True):
        boxes = true[row["key"]]
        map_hw = stored.map()
        scaled = (np.nan_to_num(map_in_original(stored), nan=map_hw.min()) - map_hw.min()) / np.ptp(map_hw)
        expected = {"found_f1": naive_f1(scaled, boxes), "found_f1_mask": naive_f1(naive_mask(stored), boxes)}
        subjects = {"found": tuple(stored.boxes[0]), "centre": centre_box(*SIZE), "whole": (0, 0, WIDTH, HEIGHT)}
        for subject, box in subjects.items():
            hit = any(naive_iou(box, one) > 0.5 for one in boxes)
            expected[f"{subject}_le"] = float(not hit)
            expected[f"{subject}_om"] = float(not (hit and stored.predicted == stored.label))
            if subject != "found":
                expected[f"{subject}_f1"] = expected[f"{subject}_f1_mask"] = naive_f1(filled(box), boxes)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for subject, column in product(("found", "centre", "whole"), COLUMNS):
        values = [row[f"{subject}_{column}"] for row in kept]
        percent = found.means[subject][column].percent()
        assert percent["value"] == pytest.approx(100 * np.mean(values), rel=1e-6)
        assert percent["plus_minus"] == pytest.approx(196 * np.std(values) / math.sqrt(len(values)), rel=1e-5)
    means = {column: found.means["found"][column].percent()["value"] for column in COLUMNS}
    assert 0 < means["le"] < means["om"] < 100
    assert json.loads((made.path / "metrics/localization.json").read_text()) == json.loads(json.dumps(found.summary()))


def test_annotated_boxes_are_inclusive(tmp_path: Path) -> None:
    """A true box of 1 x 2 pixels would be empty if its inclusive edges were read as half-open."""
    made = make_run(tmp_path, shards=1, json=BLANK)
    alter(made, boxes=[[5, 5, 6, 7]])
    annotate(made, lambda key: b'{"boxes": [[5, 5, 5, 6]]}')
    assert evaluate(str(made.path)).means["found"]["le"].total == 0
    annotate(made, lambda key: b'{"boxes": [[5, 5, 6, 7]]}')  # 2 x 3: IoU 2 / 6
    assert evaluate(str(made.path)).means["found"]["le"].total == 5


def test_boxes_go_through_the_geometry_of_the_crop(tmp_path: Path) -> None:
    """A true box is hit at the mask's box in the original, and not at the same numbers in input pixels."""
    made = make_run(tmp_path, shards=1, json=BLANK)
    row = next(iter(open_run(str(made.path))))
    box = original_box((20, 2, 30, 8), tuple(row.geometry), HEIGHT, WIDTH)
    alter(made, boxes=[box])
    annotate(made, lambda key: inclusive(tuple(box) if key == "s0k0" else (20, 2, 30, 8)))
    evaluate(str(made.path))
    assert [row["found_le"] for row in rows_of(made)] == [0, 1, 1, 1, 1]


def test_failed_rows_are_misses_and_samples_without_boxes_are_skipped(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, broken=((0, 1), (0, 2)), json=BLANK)
    stated = {"s0k0": inclusive((0, 0, WIDTH, HEIGHT)), "s0k1": inclusive((0, 0, WIDTH, HEIGHT))}
    stated |= {"s0k2": b'{"boxes": [[0, 0, 5, 5]]}', "s0k3": None, "s0k4": b'{"boxes": [[4, 4, 1, 1]]}'}
    annotate(made, stated.get)
    found = evaluate(str(made.path))
    assert (found.samples, found.without_boxes, found.bad_annotations) == (3, 1, 1)
    kept = {row["key"]: row for row in rows_of(made)}
    for key in ("s0k1", "s0k2"):
        assert [kept[key][f"found_{column}"] for column in COLUMNS] == [1, 1, 0, 0]
    assert kept["s0k1"]["whole_le"] == 0  # the annotation gives the image's size
    assert (kept["s0k2"]["whole_le"], kept["s0k2"]["whole_f1"]) == (1, 0)  # nothing gives its size
    assert list(found.first_failed) == ["part0/train: s0k1", "part0/train: s0k2"]
    lines = "\n".join(remarks(found))
    for words in ("s0k1: decode_failed", "skipped: 1 sample without boxes", "part0/train: s0k4: [4, 4, 1, 1] is not"):
        assert words in lines
    assert found.summary()["statuses"] == {"ok": 1, "decode_failed": 2}


def test_an_empty_mask_is_no_hit_and_no_failure(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((0, 0, WIDTH, HEIGHT)))
    zeros = {"map": bytes(64), "mask": bytes(CROP * CROP // 8), "boxes": [], "status": ZERO_MAP, "error": "zeros"}
    alter(made, **zeros, mask_threshold=None)
    found = evaluate(str(made.path))
    assert {name: found.means["found"][name].percent()["value"] for name in COLUMNS} == {
        "le": 100, "om": 100, "f1": 0, "f1_mask": 0,
    }  # fmt: skip
    assert not found.first_failed


def test_class_agnostic_runs_and_several_targets(tmp_path: Path) -> None:
    box = inclusive((10, 10, 40, 40))
    agnostic = make_run(tmp_path / "a", shards=1, json=box)
    expected = evaluate(str(agnostic.path)).means
    alter(agnostic, target=None, score=None)
    assert evaluate(str(agnostic.path)).means == expected
    several = make_run(tmp_path / "b", shards=1, targets=3, json=box)
    found = evaluate(str(several.path))
    assert found.samples == 5
    assert found.means == expected  # those of the first target
    assert "the first target counts" in "\n".join(remarks(found))


def test_samples_without_a_label_have_no_om(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    alter(made, label=None)
    found = evaluate(str(made.path))
    assert found.means["found"]["om"].percent() is None
    assert "| -" in as_table(found)


def test_runs_without_maps_have_the_f1_of_their_masks(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, broken=((0, 1),), json=inclusive((10, 10, 40, 40)), save_map=False)
    found = evaluate(str(made.path), metrics=["f1"])
    assert found.means["found"]["f1"].percent() is None
    assert found.means["found"]["f1_mask"].percent()["value"] > 0
    assert "--no-map" in "\n".join(remarks(found))


def test_maps_that_are_masks_are_not_scaled(tmp_path: Path) -> None:
    true = (10, 10, 40, 40)
    made = make_run(tmp_path, shards=1, samples=1, json=inclusive(true), method="casm")
    (row,) = open_run(str(made.path))
    evaluate(str(made.path))
    (kept,) = rows_of(made)
    # The map has values outside of [0, 1]. They are clipped before the map is laid, not after.
    clipped = np.nan_to_num(over_frame(row.map().clip(0, 1), (CROP, CROP), row.geometry, *SIZE))
    assert kept["found_f1"] == pytest.approx(naive_f1(clipped, [true]), rel=1e-5)


def test_other_sizes_are_told(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=b'{"boxes": [[0, 0, 5, 5]], "height": 88, "width": 120}')
    assert "5 samples were annotated at another size" in "\n".join(remarks(evaluate(str(made.path))))


# Shards, errors, the command


def test_shards_that_were_moved_or_are_some_of_the_runs(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    everything = evaluate(str(made.path)).means
    moved = tmp_path / "elsewhere"
    (tmp_path / "shards").rename(moved)
    assert evaluate(str(made.path), [str(moved)]).means == everything
    found = evaluate(str(made.path), [str(moved / "part1")])
    assert found.samples == 5
    assert found.notes[-1] == "1 of the run's 3 shards are evaluated"
    assert sorted(path.name for path in (made.path / "metrics/localization").iterdir()) == ["part1"]


def test_a_tar_of_another_size_is_not_the_runs(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    tar = Path(made.run.shards[1].url)
    elsewhere = tmp_path / "elsewhere/part1/train.tar"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UserError, match="is not a shard of"):
        evaluate(str(made.path), [str(elsewhere)])
    tar.write_bytes(tar.read_bytes() + bytes(512))  # the tar changed after the run
    found = evaluate(str(made.path), [str(tmp_path / "shards")])
    assert found.samples == 10
    assert "changed since it was listed" in found.unread["part1/train"]


def test_wrong_calls(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=BLANK)
    run = str(made.path)
    with pytest.raises(UserError, match="'iou' is not one of le, om, f1"):
        evaluate(run, metrics=["le,iou"])
    with pytest.raises(UserError, match=r"none of the 15 samples has boxes to judge by .*pack --boxes"):
        evaluate(run)
    other = write_tar(tmp_path / "other.tar", [("a", {"jpg": picture(0)})])
    with pytest.raises(UserError, match=r"other.tar .* is not a shard of"):
        evaluate(run, [str(tmp_path / "shards"), str(other)])
    (tmp_path / "copy/part1").mkdir(parents=True)
    (tmp_path / "copy/part1/train.tar").write_bytes(Path(made.run.shards[1].url).read_bytes())
    with pytest.raises(UserError, match="both the run's part1/train"):
        evaluate(run, [str(tmp_path / "shards"), str(tmp_path / "copy")])
    (made.path / receipt_name("part1/train")).unlink()
    with pytest.raises(UserError, match="not complete: 1 of 3 shards are missing, 5 samples"):
        evaluate(run)
    with pytest.raises(UserError, match="holds no run"):
        evaluate(str(tmp_path))


def test_a_run_that_cannot_be_written_to(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    (made.path / "metrics").write_bytes(b"in the way")
    with pytest.raises(UserError, match=r"run/metrics is a file, where a folder should be"):
        evaluate(str(made.path))


def test_shards_beyond_the_limit_of_a_run_are_skipped(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)), limit=15)
    write_tar(tmp_path / "shards/part9/train.tar", [("a", {"jpg": picture(0)})])
    found = evaluate(str(made.path), [str(tmp_path / "shards")])
    assert found.samples == 15
    assert "1 shards are beyond the --limit of the run and are skipped" in found.notes


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    tars = [shard.url for shard in made.run.shards]
    ended = call(made.path, "--shards", *tars, "--metric", "le,f1")
    assert ended.exit_code == 0
    head, _, *rows = ended.stdout.splitlines()[:5]
    assert head.replace(" ", "") == "||LE%|F1%|F1%ofthemask|"
    assert [row.split("|")[1].strip() for row in rows] == [
        "grad-cam of resnet18", "centre box of half the area", "whole image",
    ]  # fmt: skip
    as_json = json.loads(call(made.path, "--json").stdout)
    assert as_json["percent"]["whole"]["le"]["value"] == 100
    assert as_json["percent"]["found"].keys() == set(COLUMNS)
    assert f"{as_json['percent']['found']['f1']['value']:.1f} ±" in rows[0]
    assert isinstance(call(made.path, "--metric", "f2").exception, UserError)


def test_a_shard_that_cannot_be_read_is_listed_and_counts_for_nothing(tmp_path: Path) -> None:
    made = make_run(tmp_path, json=inclusive((10, 10, 40, 40)))
    Path(made.run.shards[0].url).unlink()
    raw = bytearray(made.data(1).read_bytes())
    raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
    made.data(1).write_bytes(raw)
    ended = call(made.path, "--json")
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert found["samples"] == 5
    assert list(found["unread_shards"]) == ["part0/train", "part1/train"]
    assert "no such file" in found["unread_shards"]["part0/train"]
    assert "part0/train: " in ended.stderr


def test_om_of_labels_that_are_not_the_model_s_is_said_to_tell_nothing(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=12, samples=5, target="top1", json=members())
    notes = evaluate(str(made.path)).notes  # the helper's top-1 is never the label
    assert [note.partition(":")[0] for note in notes] == ["OM tells nothing here"]
    assert "in 0 of 60 samples" in notes[0]
    assert evaluate(str(made.path), metrics=["le"]).notes == []
