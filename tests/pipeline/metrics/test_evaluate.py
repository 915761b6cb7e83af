"""Evaluations of made runs equal loops over pixels, for all kinds of rows, shards and annotations."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from judging import BLANK, alter, annotate, forget, found_of, judge, rows_of
from made_run import CROP, SIZE, make_run
from naive_metrics import HEIGHT, WIDTH, filled, inclusive, naive_f1, naive_iou, naive_mask, some_box
from naive_rows import original_box

from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.metrics.localization.boxes import centre_box
from saltern.pipeline.metrics.table import as_markdown, remarks
from saltern.pipeline.runs.reader import map_in_original, open_run
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import BAD_BOXES, CENTRE, FOUND, NO_BOXES, WHOLE
from saltern.schemas.saliency import ZERO_MAP

BOTH = {FOUND: None, CENTRE: centre_box(*SIZE), WHOLE: (0, 0, WIDTH, HEIGHT)}
COLUMNS = ("le", "om", "f1", "f1_mask")


@pytest.mark.slow
def test_every_number_is_that_of_the_naive_loops(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, json=BLANK)
    # Half of the predictions are right, so that LE and OM differ.
    alter(made, predicted=lambda key: int(key[-1]) // 2 * 2)
    draw, true = random.Random(3), {}
    for row in open_run(str(made.path)):
        near = tuple(edge + draw.choice((0, 1)) for edge in row.boxes[0])  # some hits among the misses
        true[row.key] = [some_box(draw) for _ in range(draw.randint(1, 3))] + [near] * draw.randint(0, 1)
    annotate(made, lambda key: inclusive(*true[key]))
    evaluation = judge(made.path)
    kept = {subject: rows_of(made, f"localization{'-controls' * (subject != FOUND)}", subject) for subject in BOTH}
    assert [row["key"] for row in kept[FOUND]] == list(true)
    for at, stored in enumerate(open_run(str(made.path))):
        boxes = true[stored.key]
        map_hw = stored.map()
        scaled = (np.nan_to_num(map_in_original(stored), nan=map_hw.min()) - map_hw.min()) / np.ptp(map_hw)
        f1 = {"f1": naive_f1(scaled, boxes), "f1_mask": naive_f1(naive_mask(stored), boxes)}
        for subject, box in BOTH.items():
            box = box or tuple(stored.boxes[0])
            hit = any(naive_iou(box, one) > 0.5 for one in boxes)
            expected = {"le": float(not hit), "om": float(not (hit and stored.predicted == stored.label))}
            expected |= f1 if subject == FOUND else dict.fromkeys(f1, naive_f1(filled(box), boxes))
            row = kept[subject][at]
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for subject in BOTH:
        estimates = evaluation.runs[0].estimates if subject == FOUND else evaluation.controls[subject]
        for column in COLUMNS:
            values = [row[column] for row in kept[subject]]
            assert estimates[column].value == pytest.approx(np.mean(values), rel=1e-6)
            assert estimates[column].count == len(values)
    means = evaluation.runs[0].estimates
    assert 0 < means["le"].value < means["om"].value < 1
    summary = json.loads((made.path / "metrics/localization.json").read_text())
    assert summary["metrics"] == {name: means[name].to_dict() for name in means}
    assert (summary["samples"], summary["method"]) == (10, "grad-cam")


def test_annotated_boxes_are_inclusive(tmp_path: Path) -> None:
    """A true box of 1 x 2 pixels would be empty if its inclusive edges were read as half-open."""
    made = make_run(tmp_path, shards=1, json=BLANK)
    alter(made, boxes=[[5, 5, 6, 7]])
    annotate(made, lambda key: b'{"boxes": [[5, 5, 5, 6]]}')
    assert found_of(made.path)["le"].value == 0
    forget(made)
    annotate(made, lambda key: b'{"boxes": [[5, 5, 6, 7]]}')  # 2 x 3: IoU 2 / 6
    assert found_of(made.path)["le"].value == 1


def test_boxes_go_through_the_geometry_of_the_crop(tmp_path: Path) -> None:
    """A true box is hit at the mask's box in the original, and not at the same numbers in input pixels."""
    made = make_run(tmp_path, shards=1, json=BLANK)
    row = next(iter(open_run(str(made.path))))
    box = original_box((20, 2, 30, 8), tuple(row.geometry), HEIGHT, WIDTH)
    alter(made, boxes=[box])
    annotate(made, lambda key: inclusive(tuple(box) if key == "s0k0" else (20, 2, 30, 8)))
    judge(made.path)
    assert [row["le"] for row in rows_of(made)] == [0, 1, 1, 1, 1]


def test_failed_rows_are_misses_and_samples_without_boxes_are_skipped(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, broken=((0, 1), (0, 2)), json=BLANK)
    stated = {"s0k0": inclusive((0, 0, WIDTH, HEIGHT)), "s0k1": inclusive((0, 0, WIDTH, HEIGHT))}
    stated |= {"s0k2": b'{"boxes": [[0, 0, 5, 5]]}', "s0k3": None, "s0k4": b'{"boxes": [[4, 4, 1, 1]]}'}
    annotate(made, stated.get)
    evaluation = judge(made.path)
    census = evaluation.runs[0].census
    assert (census.judged, census.statuses[NO_BOXES], census.statuses[BAD_BOXES]) == (3, 1, 1)
    kept = {row["key"]: row for row in rows_of(made)}
    assert len(kept) == 5
    for key in ("s0k1", "s0k2"):
        assert [kept[key][column] for column in COLUMNS] == [1, 1, 0, 0]
    whole = {row["key"]: row for row in rows_of(made, "localization-controls", WHOLE)}
    assert whole["s0k1"]["le"] == 0  # the annotation gives the image's size
    assert (whole["s0k2"]["le"], whole["s0k2"]["f1"]) == (1, 0)  # nothing gives its size
    assert list(census.failed) == ["part0/train: s0k1", "part0/train: s0k2"]
    lines = "\n".join(remarks(evaluation))
    for words in ("s0k1: decode_failed", "skipped: 1 sample without boxes", "part0/train: s0k4: [4, 4, 1, 1] is not"):
        assert words in lines
    assert census.summary()["statuses"] == {"decode_failed": 2, "ok": 1, NO_BOXES: 1, BAD_BOXES: 1}


def test_boxes_outside_of_the_image_are_bad_and_no_misses(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=BLANK)
    far, edge = [WIDTH, HEIGHT, WIDTH + 9, HEIGHT + 9], [WIDTH - 1, HEIGHT - 1, WIDTH + 9, HEIGHT + 9]
    sized = {"boxes": [far], "height": HEIGHT + 1, "width": WIDTH + 1}
    stated = {
        "s0k0": {"boxes": [far]},
        "s0k1": {"boxes": [[0, 0, 5, 5], far]},
        "s0k2": {"boxes": [edge]},
        "s0k3": sized,
    }
    annotate(made, lambda key: json.dumps(stated.get(key, {})).encode())
    evaluation = judge(made.path)
    assert [row["status"] for row in rows_of(made)] == [BAD_BOXES, BAD_BOXES, "ok", "ok", NO_BOXES]
    said = f"{far} lies outside of the image, {WIDTH} x {HEIGHT} pixels"
    assert f"2 samples whose boxes cannot be read, the first part0/train: s0k0: its box {said}" in "\n".join(
        remarks(evaluation)
    )


def test_the_energy_of_boxes_is_the_share_of_their_area(tmp_path: Path) -> None:
    true = [(0, 0, 30, 20), (20, 10, 40, 30)]
    made = make_run(tmp_path, shards=1, json=inclusive(*true))
    controls = judge(made.path).controls
    union = np.maximum(*map(filled, true))
    for subject in (CENTRE, WHOLE):
        box = filled(BOTH[subject])
        assert controls[subject]["energy"].value == pytest.approx((union * box).sum() / box.sum())


def test_an_empty_mask_is_no_hit_and_no_failure(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((0, 0, WIDTH, HEIGHT)))
    zeros = {"map": bytes(64), "mask": bytes(CROP * CROP // 8), "boxes": [], "status": ZERO_MAP, "error": "zeros"}
    alter(made, **zeros, mask_threshold=None)
    judged = judge(made.path).runs[0]
    assert {name: judged.estimates[name].value for name in COLUMNS} == {"le": 1, "om": 1, "f1": 0, "f1_mask": 0}
    assert not judged.census.failed


@pytest.mark.slow
def test_class_agnostic_runs_and_several_targets(tmp_path: Path) -> None:
    box = inclusive((10, 10, 40, 40))
    agnostic = make_run(tmp_path / "a", shards=1, json=box)
    expected = found_of(agnostic.path)
    alter(agnostic, target=None, score=None)
    forget(agnostic)
    assert found_of(agnostic.path) == expected
    several = make_run(tmp_path / "b", shards=1, targets=3, json=box, target="top:3")
    evaluation = judge(several.path)
    assert evaluation.runs[0].census.judged == 5
    assert found_of(several.path) == expected  # those of the first target
    assert "the first target counts" in "\n".join(remarks(evaluation))


def test_samples_without_a_label_have_no_om(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=inclusive((10, 10, 40, 40)))
    alter(made, label=None)
    evaluation = judge(made.path)
    assert evaluation.runs[0].estimates["om"].count == 0
    assert "LE %" in as_markdown(evaluation)
    assert "OM %" not in as_markdown(evaluation)
    assert "no sample has a value of OM %, difficult %" in list(remarks(evaluation))
    alone = as_markdown(judge(made.path, metrics=["om"]))
    assert alone.splitlines()[0].split() == ["|", "|", "OM", "%", "↓", "|"]
    assert all(line.split()[-2] == "-" for line in alone.splitlines()[2:])


def test_runs_without_maps_have_the_f1_of_their_masks(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, broken=((0, 1),), json=inclusive((10, 10, 40, 40)), save_map=False)
    evaluation = judge(made.path, metrics=["f1,f1-mask"])
    assert evaluation.runs[0].estimates["f1"].count == 0
    assert evaluation.runs[0].estimates["f1_mask"].value > 0
    assert "--no-map" in "\n".join(remarks(evaluation))
    with pytest.raises(UserError, match="stores no maps"):
        judge(made.path, metrics=["statistics"])


def test_maps_that_are_masks_are_not_scaled(tmp_path: Path) -> None:
    true = (10, 10, 40, 40)
    made = make_run(tmp_path, shards=1, samples=1, json=inclusive(true), method="casm")
    (row,) = open_run(str(made.path))
    judge(made.path)
    (kept,) = rows_of(made)
    # The map has values outside of [0, 1]. They are clipped before the map is laid, not after.
    clipped = np.nan_to_num(over_frame(row.map().clip(0, 1), (CROP, CROP), row.geometry, *SIZE))
    assert kept["f1"] == pytest.approx(naive_f1(clipped, [true]), rel=1e-5)


def test_other_sizes_are_told(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=b'{"boxes": [[0, 0, 5, 5]], "height": 88, "width": 120}')
    assert "5 samples were annotated at another size" in "\n".join(remarks(judge(made.path)))
