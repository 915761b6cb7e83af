"""Samples with other member names than `jpg` and `cls`: rows say which option names them, and the options work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from extracting import REQUEST, extract
from making import HELPERS, picture, write_tar
from typer.testing import CliRunner

import saltern
from saltern.jobs.main import app
from saltern.pipeline.extract.request import resolve
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.shards.samples import Sample
from saltern.schemas.config import Members
from saltern.schemas.errors import UserError
from saltern.schemas.run import Run


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HELPERS)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Return a tar of x.image.jpg, x.mask.png, x.txt and x.json, as some exporters name them."""
    members = [
        (
            f"x{number}",
            {
                "image.jpg": picture(number),
                "mask.png": picture(9, kind="PNG"),
                "txt": f"{number}\n",
                "json": json.dumps({"caption": "a 7", "class_id": number}),
            },
        )
        for number in range(3)
    ]
    return write_tar(tmp_path / "in/x.tar", members)


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "data/x.parquet").to_pylist()
    return found


def test_the_rows_name_the_options(tmp_path: Path, shard: Path) -> None:
    assert extract(shard, tmp_path / "run") == 1
    assert {row["status"] for row in rows(tmp_path / "run")} == {"missing_image"}
    assert rows(tmp_path / "run")[0]["error"].endswith("name one with --image-member image.jpg")
    extract(shard, tmp_path / "second", image_member="image.jpg")
    assert {row["status"] for row in rows(tmp_path / "second")} == {"missing_label"}
    assert rows(tmp_path / "second")[0]["error"].endswith("name it with --label-member json:class_id")


def test_a_label_that_is_no_class_is_quoted(tmp_path: Path) -> None:
    """Whatever the row says of its label, the column `label` holds a class or nothing."""
    texts = {
        "a": b"-1",
        "b": b"9" * 20,
        "c": b"dog",
        "d": b"3.0",
        "e": b"7",
        "f": b"",
        "g": b"\xef\xbb\xbf2",
        "h": "\u0663",
    }
    tar = write_tar(tmp_path / "in/x.tar", ((key, {"jpg": picture(0), "cls": text}) for key, text in texts.items()))
    extract(tar, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["label"] for row in found] == [None, None, None, None, 7, None, 2, None]
    errors = [row["error"] or "" for row in found]
    assert errors[0] == "label -1 lies outside the model's classes 0..4"
    assert errors[1] == f"label {'9' * 20} lies outside the model's classes 0..4"
    assert "`cls` is 'dog', which is no whole number; write the class's number" in errors[2]
    assert "`cls` is '3.0'" in errors[3]
    assert errors[4] == "label 7 lies outside the model's classes 0..4"
    assert "no `cls` that is a number" in errors[5]
    assert errors[6] == ""
    assert "`cls` is '\u0663'" in errors[7]


@pytest.mark.parametrize("label_member", ["txt", "json:class_id", ".TXT"])
def test_the_options_work_in_the_run_and_its_reader(tmp_path: Path, shard: Path, label_member: str) -> None:
    out = tmp_path / "run"
    assert extract(shard, out, image_member=".image.JPG", label_member=label_member) == 0
    found = rows(out)
    assert [(row["key"], row["label"], row["target"]) for row in found] == [(f"x{i}", i, i) for i in range(3)]
    assert {row["status"] for row in found} <= {"ok", "zero_map"}
    run = saltern.open_run(str(out))
    for number, (sample, _) in enumerate(run.joined(run.shards[0])):
        assert sample.image == picture(number)
    assert extract(shard, out, image_member="image.jpg", label_member=label_member) == 0  # nothing to do
    with pytest.raises(UserError, match=r"label_member: .*there, None requested"):
        extract(shard, out, image_member="image.jpg")


@pytest.mark.slow
def test_attack_and_plan_take_them(tmp_path: Path, shard: Path) -> None:
    common = ["--model", "making:tiny", "--layer", "body", "--batch-size", "4", "--image-member", "image.jpg"]
    planned = CliRunner().invoke(app, ["plan", str(shard), *common])
    assert planned.exit_code == 0, planned.output
    steps = ["--guide", "grad-cam", "--steps", "1", "--crop", "32", "--label-member", "json:class_id"]
    out = ["--out", str(tmp_path / "run"), "--engine", "local", "--device", "cpu"]
    made = CliRunner().invoke(app, ["attack", str(shard), *common, *steps, *out])
    assert made.exit_code == 0, made.output
    assert [(row["label"], row["status"]) for row in rows(tmp_path / "run")] == [(i, "ok") for i in range(3)]


def test_a_run_without_the_options_keeps_its_fingerprint(tmp_path: Path, shard: Path) -> None:
    extract(shard, tmp_path / "run")
    _, run = load_run_folder(str(tmp_path / "run"))
    assert "image_member" not in run.config.to_dict()
    extract(shard, tmp_path / "named", image_member="image.jpg")
    _, named = load_run_folder(str(tmp_path / "named"))
    assert named.fingerprint != run.fingerprint
    assert Run.from_json(named.to_json()).config == named.config


@pytest.mark.parametrize("option", ["image_member", "label_member"])
@pytest.mark.parametrize("given", ["", ".", "a/b", "txt:key", "json:", "a:b"])
def test_members_that_are_none(shard: Path, given: str, option: str) -> None:
    request = replace(REQUEST, shards=[str(shard)], **{option: given})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} .*: give the extension of a member"):
        resolve(request, None, "cpu", 1)


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        ('{"k": 7}', 7),
        ('{"k": "7"}', 7),
        ('{"k": 7.0}', None),
        ('{"k": true}', None),
        ('{"k": null}', None),
        ('{"k": "3_14"}', None),
        ('{"k": [7]}', None),
        ('{"k": 1e60}', None),
        ('{"k": "\\ud800"}', None),
        ('{"other": 7}', None),
        ("[7]", None),
        ("7", None),
        ("{", None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_a_class_in_the_json_member(raw: str, label: int | None) -> None:
    sample = Sample("x", 0, {"json": raw.encode()}, named=Members(label="json:k"))
    assert sample.label == label
    sample.release()
    assert sample.label == label
