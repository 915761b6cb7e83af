"""Tasks of Label Studio: percent boxes, brush strokes, and a labelling config that has their tags and labels."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from made_run import Made, make_run, write_shard
from test_rle import unpack

from saltern.pipeline.export.export import export
from saltern.pipeline.runs.reader import mask_in_original, open_run


def tasks(made: Made, out: Path) -> list[dict[str, Any]]:
    return [task for shard in made.run.shards for task in json.loads((out / f"{shard.name}.json").read_bytes())]


def test_a_task_has_its_image_and_a_prediction_for_each_target(tmp_path: Path) -> None:
    names = ["crane", "crane", *(f"<{n}> & more" for n in range(8))]  # two of ImageNet's classes have this name
    made = make_run(tmp_path, targets=2, target="top:2", broken=((1, 2),), class_names=names)
    done = export(str(made.path), "labelstudio", str(tmp_path / "out"))
    assert (done.shards, done.rows) == (3, 29)
    found = tasks(made, tmp_path / "out")
    assert len(found) == 14
    view = ElementTree.fromstring((tmp_path / "out" / "labels.xml").read_text())  # noqa: S314 - our own
    tags = {one.get("name"): [label.get("value") for label in one] for one in view}
    rows = iter(row for row in open_run(str(made.path)) if row.status == "ok")
    for task in found:
        assert parse_qs(urlsplit(task["data"]["image"]).query) == {"d": [f"{task['data']['key']}.jpg"]}
        assert len(task["predictions"]) == 2
        for prediction in task["predictions"]:
            row = next(rows)
            assert (task["data"]["key"], task["data"]["shard"]) == (row.key, row.shard)
            assert prediction["model_version"] == f"saltern grad-cam resnet18 {made.run.fingerprint}"
            assert prediction["score"] == pytest.approx(row.score)
            box, strokes = prediction["result"]
            for region, kind in ((box, "rectanglelabels"), (strokes, "brushlabels")):
                assert (region["type"], region["to_name"]) == (kind, "image")
                assert (region["original_width"], region["original_height"]) == (60, 44)
                (label,) = region["value"][kind]
                assert label == f"{row.target} {names[row.target]}"
                assert label in tags[region["from_name"]]
            x, y, width, height = (box["value"][name] for name in ("x", "y", "width", "height"))
            pixels = np.array([x * 60, y * 44, (x + width) * 60, (y + height) * 44]) / 100
            assert pixels == pytest.approx(row.boxes[0])
            assert 0 <= x <= x + width <= 100 + 1e-9
            stroke_YX = unpack(strokes["value"]["rle"]).reshape(44, 60, 4)[..., 3] > 0
            assert np.array_equal(stroke_YX, mask_in_original(row))
    ids = [region["id"] for task in found[:1] for one in task["predictions"] for region in one["result"]]
    assert len(set(ids)) == len(ids)
    assert next(rows, None) is None


def test_a_tar_that_is_gone_fails_its_shard_alone(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    Path(made.run.shards[1].url).unlink()
    done = export(str(made.path), "labelstudio", str(tmp_path / "out"))
    assert list(done.failures) == ["part1/train"]
    assert "--shards" in done.failures["part1/train"]
    assert not (tmp_path / "out" / "part1/train.json").exists()
    assert len(json.loads((tmp_path / "out" / "part2/train.json").read_bytes())) == 5


def test_classes_without_names_are_their_numbers(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=1)
    export(str(made.path), "labelstudio", str(tmp_path / "out"))
    (task,) = tasks(made, tmp_path / "out")
    assert task["predictions"][0]["result"][0]["value"]["rectanglelabels"] == ["0"]
    assert (tmp_path / "out" / "labels.xml").read_text().count('<Label value="9"/>') == 2


def test_a_damaged_row_fails_its_shard_alone(tmp_path: Path) -> None:
    made = make_run(tmp_path, samples=1)
    row = next(iter(open_run(str(made.path))))
    names = ("key", "shard", "index", "boxes", "image_height", "image_width", "status", "target")
    record = {name: getattr(row, name) for name in names} | {"mask": row.mask_bytes}
    write_shard(made, 0, 1, [record], (4, 4))
    done = export(str(made.path), "labelstudio", str(tmp_path / "out"))
    assert (done.shards, list(done.failures)) == (2, ["part0/train"])
    assert "no geometry" in done.failures["part0/train"]
