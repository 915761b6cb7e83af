"""Test the picture of curves: drawn from incomplete logs too, in bounded time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saltern.pipeline.casm.watch import curves

KEYS = ("clean_loss", "masked_loss", "mask_loss", "score_term", "size_term", "mask_mean", "mask_std", "right",
        "confused", "lambda")  # fmt: skip


def log(root: Path, steps: int, **changed: float) -> None:
    draw = np.random.default_rng(0)
    rows = ({"step": step, **dict(zip(KEYS, draw.random(len(KEYS)).tolist(), strict=True)), **changed}
            for step in range(steps))  # fmt: skip
    (root / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def validations(root: Path, *steps: int) -> None:
    rows = [{"step": step, "le": 60.0 - step, "f1": 40.0, "top1": None} for step in steps]
    (root / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawn(root: Path) -> bytes:
    curves.draw(root)
    with Image.open(root / "curves.png") as picture:
        assert picture.size == (1200, 1000)
        picture.load()
    assert not list(root.glob(".unfinished-*"))
    return (root / "curves.png").read_bytes()


@pytest.mark.slow
def test_a_log_whose_last_line_is_cut_off_is_drawn_without_it(tmp_path):
    log(tmp_path, 100)
    validations(tmp_path, 50, 100)
    whole = drawn(tmp_path)
    for name in ("log.jsonl", "validation.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 100, "clean_loss": 0.')
    assert [line["step"] for line in curves.read(tmp_path / "log.jsonl")] == list(range(100))
    assert drawn(tmp_path) == whole
    validations(tmp_path, 50)
    assert drawn(tmp_path) != whole


@pytest.mark.slow
def test_little_is_drawn_too(tmp_path):
    drawn(tmp_path)
    for steps, validated in ((0, False), (1, False), (90, True)):
        log(tmp_path, steps)
        if validated:
            validations(tmp_path, 1)
        drawn(tmp_path)
    log(tmp_path, 0)
    drawn(tmp_path)


@pytest.mark.slow
def test_what_is_not_finite_or_not_positive_leaves_a_gap(tmp_path):
    log(tmp_path, 200, **{"lambda": 0.0, "clean_loss": math.nan, "masked_loss": math.inf})
    drawn(tmp_path)


@pytest.mark.slow
def test_of_a_long_log_a_bounded_part_is_read(tmp_path, monkeypatch):
    log(tmp_path, 30_000)
    parsed = []
    monkeypatch.setattr(curves.json, "loads", lambda raw: parsed.append(1) or json.JSONDecoder().decode(raw.decode()))
    found = [line["step"] for line in curves.read(tmp_path / "log.jsonl", 500)]
    assert 490 <= len(found) <= len(parsed) <= 502
    assert found == sorted(set(found))
    assert found[0] < 100
    assert found[-1] > 29_900
    assert 40 < min(np.diff(found)) <= max(np.diff(found)) < 80
    log(tmp_path, 1200)
    assert len(curves.read(tmp_path / "log.jsonl", 1000)) == 600
    assert len(curves.read(tmp_path / "log.jsonl")) == 1200


def test_smooth_lines_are_running_means():
    value = np.random.default_rng(1).random(400)
    value[37], value[120] = math.nan, math.inf
    value[200:260] = math.nan
    found = curves._smooth(value)
    for at in range(400):
        near = value[max(at - 5, 0) : at + 6]
        near = near[np.isfinite(near)]
        np.testing.assert_allclose(found[at], near.mean() if len(near) else math.nan, rtol=1e-9)
