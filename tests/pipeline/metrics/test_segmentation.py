"""The family `pixels`, and box IoU, equal loops over pixels."""

import io
import json
import math
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from judging import alter, annotate, judge, rows_of
from made_run import CROP, SIZE, Made, make_run
from naive_metrics import HEIGHT, WIDTH, filled, inclusive, naive_mask
from naive_wsol import naive_pxap
from PIL import Image

from saltern.pipeline.metrics.localization.boxes import centre_box
from saltern.pipeline.metrics.localization.pixels import BINS
from saltern.pipeline.metrics.table import remarks
from saltern.pipeline.runs.reader import Row, open_run
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import BAD_MASK, CENTRE, FOUND, NO_MASK, PIXEL_BINS, WHOLE
from saltern.schemas.saliency import NONFINITE

SPACE = b'{"boxes": []}'.ljust(600)  # of the first tars, so that masks have room in the second
KEYS = [f"s0k{at}" for at in range(5)]


def true_mask(key: str) -> np.ndarray:
    """Return a mask as the file holds it: two boxes, one of them ignored."""
    made = np.zeros(SIZE, np.uint8)
    at = KEYS.index(key)
    made[5 + at : 25 + at, 10 : 30 + 3 * at] = 255 if at % 2 else 1
    made[20:30, 25:40] = 128
    return made


def png(mask_YX: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask_YX).save(stream, "PNG")
    return stream.getvalue()


def naive_iou(found_YX: np.ndarray, mask_YX: np.ndarray) -> float:
    common = union = 0
    for found, true in zip(found_YX.flat, mask_YX.flat, strict=True):
        if true != 128:
            common += bool(found) and true in (1, 255)
            union += bool(found) or true in (1, 255)
    return common / union


def at_input(row: Row, mask_YX: np.ndarray) -> np.ndarray:
    """Return the true mask at the input's pixel centres: 0, 1 or 255 for ignored."""
    scale_x, scale_y, offset_x, offset_y = row.geometry
    made = np.full((CROP, CROP), 255)
    for y, x in product(range(CROP), range(CROP)):
        row_at, column_at = math.floor(offset_y + scale_y * (y + 0.5)), math.floor(offset_x + scale_x * (x + 0.5))
        if 0 <= row_at < HEIGHT and 0 <= column_at < WIDTH:
            made[y, x] = {0: 0, 1: 1, 255: 1, 128: 255}[int(mask_YX[row_at, column_at])]
    return made


def masked_run(folder: Path, **changes: object) -> Made:
    made = make_run(folder, shards=1, json=SPACE, **changes)  # type: ignore[arg-type]
    annotate(made, lambda key: png(true_mask(key)), member="mask.png")
    return made


@pytest.mark.slow
def test_every_number_is_that_of_the_naive_loops(tmp_path: Path) -> None:
    assert BINS == PIXEL_BINS
    made = masked_run(tmp_path)
    evaluation = judge(made.path, metrics=["pixels"])
    rows = list(open_run(str(made.path)))
    boxes = {CENTRE: centre_box(*SIZE), WHOLE: (0, 0, WIDTH, HEIGHT)}
    for subject in (FOUND, CENTRE, WHOLE):
        kept = rows_of(made, f"pixels{'-controls' * (subject != FOUND)}", subject)
        expected = [
            naive_iou(filled(boxes[subject]) if subject in boxes else naive_mask(row), true_mask(row.key))
            for row in rows
        ]
        assert [row["segmentation_iou"] for row in kept] == pytest.approx(expected)
        found = evaluation.runs[0].estimates if subject == FOUND else evaluation.controls[subject]
        assert found["segmentation_iou"].value == pytest.approx(np.mean(expected))
    pxap = evaluation.runs[0].estimates["pxap"]
    truth = [at_input(row, true_mask(row.key)) for row in rows]
    assert pxap.value == pytest.approx(naive_pxap([row.map("input") for row in rows], truth))
    assert pxap.low <= pxap.value <= pxap.high
    # The whole image is a constant map.
    known = np.concatenate([mask[mask != 255] for mask in truth])
    assert evaluation.controls[WHOLE]["pxap"].value == pytest.approx(known.mean())
    summary = json.loads((made.path / "metrics/pixels.json").read_text())
    assert summary["metrics"]["pxap"]["count"] == summary["samples"] == 5


def test_failed_rows_count_and_samples_without_a_mask_do_not(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, broken=((0, 0),), json=SPACE)
    masks = {
        "s0k0": png(true_mask("s0k0")),
        "s0k1": png(true_mask("s0k1")) + bytes(2048),
        "s0k2": png(true_mask("s0k2")[:9]),
    }
    masks |= {"s0k3": png(np.full(SIZE, 77, np.uint8))}
    annotate(made, masks.get, member="mask.png")
    alter(
        made,
        status=lambda key: {"s0k0": "decode_failed", "s0k1": NONFINITE}.get(key, "ok"),
        **dict.fromkeys(("map", "mask", "boxes"), None),
    )
    judged = judge(made.path, metrics=["pixels"])
    kept = rows_of(made, "pixels")
    assert [row["status"] for row in kept] == ["decode_failed", NONFINITE, BAD_MASK, BAD_MASK, NO_MASK]
    assert [row["segmentation_iou"] for row in kept] == [0, 0, None, None, None]
    # An image that was not read has no input to count pixels of; a map that is not there is constant.
    assert [row["pixel_counts"] is None for row in kept] == [True, False, True, True, True]
    rows = {row.key: row for row in open_run(str(made.path))}
    truth = at_input(rows["s0k1"], true_mask("s0k1"))
    share = (truth == 1).sum() / (truth != 255).sum()
    assert judged.runs[0].estimates["pxap"].value == pytest.approx(share)
    assert judged.runs[0].census.judged == 2
    text = "\n".join(remarks(judged))
    assert "skipped: 1 sample without pixel masks" in text
    assert "2 samples whose pixel masks cannot be read, the first part0/train: s0k2: its mask.png has 9 x 60" in text


def test_without_any_mask_there_is_nothing_to_judge_by(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=SPACE)
    with pytest.raises(UserError, match=r"none of the 5 samples has a pixel mask to judge by \(a member mask.png: 0 b"):
        judge(made.path, metrics=["pxap"])


def test_runs_without_maps_have_the_iou_of_their_masks(tmp_path: Path) -> None:
    estimates = judge(masked_run(tmp_path, save_map=False).path, metrics=["pixels"]).runs[0].estimates
    assert estimates["segmentation_iou"].count == 5
    assert "pxap" not in estimates


@pytest.mark.slow
def test_a_tar_that_was_touched_is_judged_again_only_if_a_mask_changed(tmp_path: Path) -> None:
    made = masked_run(tmp_path)
    data = made.path / "metrics/pixels/data/part0/train.parquet"

    def look(mtime_s: int) -> tuple[int, int]:
        os.utime(made.run.shards[0].url, (mtime_s, mtime_s))
        made.run = replace(made.run, shards=[replace(made.run.shards[0], mtime_ns=mtime_s * 10**9)])
        (made.path / "run.json").write_bytes(made.run.to_json())
        estimates = judge(made.path, metrics=["segmentation-iou"]).runs[0].estimates
        return estimates["segmentation_iou"].count, data.stat().st_ino

    first = look(1000)
    assert look(2000) == first
    annotate(made, lambda key: png(np.full(SIZE, 128, np.uint8)), member="mask.png")
    assert look(3000)[0] == 0  # all is ignored
    assert first[0] == 5


def test_box_iou_is_that_of_the_filled_boxes(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, json=b'{"boxes": []}'.ljust(200))
    true = [[(0, 0, 20, 20), (10, 10, 40, 30), (15, 5, 35, 12)], [(5, 5, 30, 40)] * 2, [(50, 3, 90, 60)]]
    annotate(made, lambda key: inclusive(*true[KEYS.index(key) % 3]))
    judge(made.path, metrics=["box-iou"])
    for subject, box in ((FOUND, None), (CENTRE, centre_box(*SIZE)), (WHOLE, (0, 0, WIDTH, HEIGHT))):
        kept = rows_of(made, f"localization{'-controls' * (subject != FOUND)}", subject)
        for row in open_run(str(made.path)):
            union = np.zeros(SIZE)
            for one in true[row.index % 3]:
                union[one[1] : one[3], one[0] : one[2]] = 1
            expected = naive_iou(naive_mask(row) if box is None else filled(box), union)
            assert kept[row.index]["box_iou"] == pytest.approx(expected)
