"""A COCO file is opened by pycocotools, and its masks, boxes and areas are those of the run in the original's frame."""

import io
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_run import make_run, write_shard
from naive_rows import over_original
from pycocotools import mask as masks
from pycocotools.coco import COCO

from saltern.pipeline.export.coco import join_parts, read_images
from saltern.pipeline.export.export import export
from saltern.pipeline.export.folder import Folder
from saltern.pipeline.runs.reader import mask_in_original, open_run
from saltern.pipeline.storage.store import Store

# pycocotools 2.0.11 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def opened(path: Path) -> COCO:
    with redirect_stdout(io.StringIO()):
        return COCO(path / "instances.json")


def test_pycocotools_opens_it_and_finds_each_rows_mask_box_and_score(tmp_path: Path) -> None:
    made = make_run(
        tmp_path, targets=2, target="top:2", broken=((1, 2),), class_names=[f"class {n}" for n in range(10)]
    )
    done = export(str(made.path), "coco", str(tmp_path / "out"))
    assert (done.shards, done.rows) == (3, 29)
    coco = opened(tmp_path / "out")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == made.run.class_names
    assert len(coco.imgs) == 14  # the broken one has no size
    rows = [row for row in open_run(str(made.path)) if row.status == "ok"]
    assert len(coco.anns) == len(rows) == 28
    for row, annotation in zip(rows, coco.loadAnns(coco.getAnnIds()), strict=True):
        image = coco.imgs[annotation["image_id"]]
        assert (image["key"], image["shard"], image["file_name"]) == (row.key, row.shard, f"{row.key}.jpg")
        mask_YX = coco.annToMask(annotation)
        assert mask_YX.shape == (image["height"], image["width"]) == (44, 60)
        assert np.array_equal(mask_YX, over_original(row.mask(), row.geometry, 44, 60) >= 0.5)
        assert annotation["area"] == masks.area(coco.annToRLE(annotation)) == mask_YX.sum()
        (x0, y0, x1, y1), (x, y, width, height) = row.boxes[0], annotation["bbox"]
        assert (x, y, x + width, y + height) == (x0, y0, x1, y1)
        assert (annotation["category_id"], annotation["score"]) == (row.target, pytest.approx(row.score))


def test_the_names_of_the_files_are_those_in_the_tar(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, image_member="jpg")
    export(str(made.path), "coco", str(tmp_path / "out"))
    assert {image["file_name"] for image in opened(tmp_path / "out").imgs.values()} == {f"s0k{n}.jpg" for n in range(5)}


def test_a_map_that_explains_no_class_is_an_object(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=1)
    row = next(iter(open_run(str(made.path))))
    names = ("key", "shard", "index", "mask_threshold", "mask_area", "boxes", "image_height", "image_width", "geometry")
    record = {name: getattr(row, name) for name in (*names, "status")} | {"mask": row.mask_bytes}
    write_shard(made, 0, 1, [record], (4, 4))
    export(str(made.path), "coco", str(tmp_path / "out"))
    coco = opened(tmp_path / "out")
    assert coco.cats == {0: {"id": 0, "name": "object"}}
    assert [(one["category_id"], one["score"]) for one in coco.anns.values()] == [(0, None)]


def test_a_shard_that_cannot_be_read_leaves_no_entry(tmp_path: Path) -> None:
    """Its tar ends before its last sample, so some of its entries are written already."""
    made = make_run(tmp_path)
    made.data(1).write_bytes(made.data(0).read_bytes())  # the keys of another shard
    done = export(str(made.path), "coco", str(tmp_path / "out"))
    assert list(done.failures) == ["part1/train"]
    coco = opened(tmp_path / "out")
    assert [image["key"] for image in coco.imgs.values()] == [f"s{s}k{k}" for s in (0, 2) for k in range(5)]
    assert sorted(coco.anns) == list(range(1, 11))


def test_memory_of_joining_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    """One thread joins. A peak of shards that are read side by side would differ from run to run."""
    made = make_run(tmp_path / "in", shards=1, samples=2)
    run = open_run(str(made.path))
    records = [record for _, record in read_images(run, run.shards[0]) if record]
    peaks: list[int] = []
    arrow: list[int] = []

    def parts(shards: int) -> Iterator[pa.RecordBatch]:
        for _ in range(shards):
            arrow.append(pa.total_allocated_bytes())
            yield pa.RecordBatch.from_pylist(records)

    for shards in (20, 1_000):
        folder = Folder(Store(str(tmp_path)), "", tmp_path)
        tracemalloc.start()
        join_parts(folder, run, parts(shards))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert json.loads((tmp_path / "instances.json").read_text())["images"][-1]["id"] == 2 * shards
    assert peaks[1] < 4 * peaks[0], peaks
    assert max(arrow) < arrow[0] + 9 * pa.RecordBatch.from_pylist(records).nbytes


def test_masks_of_the_original_are_those_of_the_definition(tmp_path: Path) -> None:
    """Over crops and squashed inputs, odd sizes and a mask that ends at the input's edge."""
    made = make_run(tmp_path, shards=1, samples=3, squash=True)
    for row in open_run(str(made.path)):
        mask_YX = mask_in_original(row)
        assert np.array_equal(mask_YX, over_original(row.mask(), row.geometry, 44, 60) >= 0.5)
        assert mask_YX.mean() == pytest.approx(row.mask_area, abs=0.05)
    assert json.loads(made.run.to_json())["config"]["squash"]
