"""Reasons of failed rows are grouped and counted; a run with too few good rows is no success."""

from dataclasses import replace
from pathlib import Path

import pytest
from commands import call
from extracting import extract
from making import picture, write_tar
from toys import receipt

from saltern.pipeline.runs.manifest import load_run_folder, read_receipts
from saltern.pipeline.runs.reasons import MIN_OK, SHOWN, Reasons, reasons_of, too_few_ok
from saltern.pipeline.runs.verify import verify
from saltern.schemas.run import Shard


def test_reasons_that_differ_in_numbers_and_names_are_one() -> None:
    reasons = Reasons()
    for text in ("label 7 of 'a.jpg'", "label 12 of 'b c.jpg'", "cut", "label 3"):
        reasons.add(text)
    reasons.add("cut", 5)
    assert reasons.top() == {"cut": 6, "label 7 of 'a.jpg'": 2, "label 3": 1}


def test_few_reasons_are_kept_however_many_there_are() -> None:
    reasons = Reasons()
    for number in range(10_000):
        reasons.add("x" * (number % 3_000) + " end")
    assert len(reasons.top()) == SHOWN
    assert max(map(len, reasons.top())) <= 200
    assert sum(reasons._counts.values()) == 10_000
    assert len(reasons._counts) < 100


def test_reasons_of_shards_are_added_up() -> None:
    shard = Shard("s", "ok", 1)
    receipts = [
        replace(receipt(shard), reasons={"decode_failed: cut at 7": 2}),
        receipt(shard),
        replace(receipt(shard), reasons={"missing_label: none": 4, "decode_failed: cut at 9": 3}),
    ]
    assert reasons_of(receipts) == {"decode_failed: cut at 7": 5, "missing_label: none": 4}


@pytest.mark.parametrize(("good", "bad", "said"), [(997, 3, False), (500, 500, False), (499, 501, True), (0, 1, True)])
def test_half_of_the_rows_must_be_ok(good: int, bad: int, said: bool) -> None:
    assert MIN_OK == 0.5
    rows = {status: count for status, count in (("ok", good), ("missing_label", bad)) if count}
    problem = too_few_ok(rows, {"missing_label: no `cls`": bad})
    assert (problem is not None) == said
    if problem:
        assert f"{good} of {good + bad:,} rows are ok" in problem
        assert "most often missing_label: no `cls`; give labels with --labels FILE" in problem


def test_zero_maps_are_results_unless_there_is_nothing_else() -> None:
    assert too_few_ok({"ok": 1, "zero_map": 9}, {}) is None
    assert "try another --layer" in str(too_few_ok({"zero_map": 9}, {}))


def test_shards_without_samples_are_no_success() -> None:
    assert "no samples" in str(too_few_ok({}, {}))


def test_unlabelled_images_exit_with_1_and_the_fix_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "s.tar", ((f"k{number}", {"jpg": picture(number)}) for number in range(6)))
    out = tmp_path / "run"
    for _ in range(2):  # also if nothing is left to do
        assert extract(tar, out) == 1
        said = capsys.readouterr().err
        (reason,) = read_receipts(*load_run_folder(str(out))).popitem()[1].reasons
        assert reason.startswith("missing_label: the target is the label, and ")
        assert f"6 rows {reason}\n" in said
        assert f"FAILED: 0 of 6 rows are ok, none; most often {reason}; give labels with --labels FILE" in said
    shown = call("status", out)
    assert shown.returncode == 1
    assert f"6 rows {reason}" in shown.stdout
    assert "FAILED: 0 of 6 rows are ok" in shown.stdout
    proven = call("verify", out)
    assert proven.returncode == 0
    assert f"6 rows {reason}" in proven.stdout
    store, run = load_run_folder(str(out))
    assert verify(store, run).reasons == {reason: 6}


def test_a_few_damaged_images_are_counted_and_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [picture(number) if number % 5 else b"no image" for number in range(10)]
    tar = write_tar(tmp_path / "s.tar", ((f"k{n}", {"jpg": image, "cls": "1"}) for n, image in enumerate(images)))
    assert extract(tar, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "2 rows decode_failed: " in said
    assert "FAILED" not in said
    # Rows that are made again are no longer counted.
    write_tar(tar, ((f"k{n}", {"jpg": picture(n), "cls": "1"}) for n in range(10)))
    assert extract(tar, tmp_path / "run", {"retry_failed": True}) == 0
    assert "decode_failed" not in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal() -> None:
    reasons = Reasons()
    reasons.add("decode_failed: \x1b[31mred\u202e")
    assert all(character.isprintable() for text in reasons.top() for character in text)
