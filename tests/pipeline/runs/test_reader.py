"""Read a run back: rows, keys, maps over their originals."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import CROP, SIZE, make_run, write_shard
from making import picture, write_shards, write_tar
from naive_rows import original_box
from numpy.typing import NDArray
from pyarrow import fs

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest
from saltern.pipeline.maps.discretize import upsample
from saltern.pipeline.maps.frame import over_frame
from saltern.pipeline.runs.dataset import SaliencyDataset
from saltern.pipeline.runs.manifest import read_receipts
from saltern.pipeline.runs.reader import SaliencyRun, map_in_original, open_run
from saltern.pipeline.shards.decode import decode
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.receipt import Receipt
from saltern.schemas.saliency import DECODE_FAILED, OK


def test_rows_come_in_shard_order_with_their_maps_and_masks(tmp_path: Path) -> None:
    made = make_run(tmp_path, targets=2)
    run = open_run(str(made.path))
    rows = list(run)
    assert run.run == made.run
    assert len(rows) == len(run) == 30
    expected = [(f"part{s}/train", f"s{s}k{k}", t) for s in range(3) for k in range(5) for t in range(2)]
    assert [(row.shard, row.key, row.target - row.index) for row in rows] == expected
    for row, place in zip(rows, expected, strict=True):
        assert np.array_equal(row.map(), made.maps[place])
        assert np.array_equal(row.mask(), made.masks[place])
        assert (row.status, row.error) == (OK, None)
        assert (row.image_height, row.image_width) == (44, 60)
        assert row.mask_area == pytest.approx(made.masks[place].mean())


def test_a_negative_label_of_an_older_run_is_none(tmp_path: Path) -> None:
    """Older runs stored a `cls` of -1, which the dataset gives for an absent label."""
    made = make_run(tmp_path, shards=1, samples=1)
    row = {"key": "a", "shard": made.run.shards[0].name, "index": 0, "label": -1, "status": DECODE_FAILED, "error": "x"}
    write_shard(made, 0, 1, [row], (4, 4))
    assert [row.label for row in open_run(str(made.path))] == [None]


def test_input_sized_maps_are_those_that_the_masks_were_made_of(tmp_path: Path) -> None:
    run = open_run(str(make_run(tmp_path, shards=1).path))
    for row in run:
        map_HW = row.map("input")
        assert map_HW.shape == (CROP, CROP)
        assert np.array_equal(map_HW, upsample(torch.from_numpy(row.map())[None], (CROP, CROP))[0].numpy())
        assert np.array_equal(map_HW >= np.float32(row.mask_threshold), row.mask())
    with pytest.raises(ValueError, match="native"):
        row.map("original")


@pytest.mark.parametrize(("dtype", "bound"), [("uint8", 1 / 500), ("float16", 1e-3), ("float32", 0)])
def test_every_stored_dtype_comes_back(tmp_path: Path, dtype: str, bound: float) -> None:
    made = make_run(tmp_path, shards=1, grid=(3, 5), map_dtype=dtype)
    for row in open_run(str(made.path)):
        found, expected = row.map(), made.maps[row.shard, row.key, 0]
        assert found.dtype == np.float32
        assert found.shape == (3, 5)
        assert np.abs(found - expected).max() <= bound * np.ptp(expected)


def test_rows_by_key(tmp_path: Path) -> None:
    made = make_run(tmp_path, targets=2)
    run = open_run(str(made.path))
    assert [(row.shard, row.index, row.target) for row in run.rows("s1k3")] == [
        ("part1/train", 3, 3),
        ("part1/train", 3, 4),
    ]
    assert np.array_equal(run.row("s2k4").map(), made.maps["part2/train", "s2k4", 0])
    assert [run.at(number) for number in range(len(run))] == list(run)
    assert run.rows("nosuch") == []
    assert run.rows("s1k3", shard="part0/train") == []
    with pytest.raises(KeyError, match="'nosuch' has no row"):
        run.row("nosuch")


def test_a_key_in_two_shards_asks_for_the_shard(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=1)
    for number, shard in enumerate(made.run.shards):
        failed = {"key": "same", "shard": shard.name, "index": 0, "status": DECODE_FAILED, "error": "no image"}
        write_shard(made, number, 1, [failed], (4, 4))
    run = open_run(str(made.path))
    assert [row.shard for row in run.rows("same")] == ["part0/train", "part1/train"]
    assert run.row("same", shard="part1/train").shard == "part1/train"
    with pytest.raises(KeyError, match="part0/train, part1/train"):
        run.row("same")
    made.data(0).unlink()
    alone = open_run(str(made.path))
    assert [row.shard for row in alone.rows("same", shard="part1/train")] == ["part1/train"]  # no other file is read
    assert alone.rows("same", shard="part9/train") == []


def test_row_groups_are_crossed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saltern.pipeline.runs.writer.ROW_GROUP", 3)
    made = make_run(tmp_path, shards=2, samples=8)
    run = open_run(str(made.path))
    assert [run.at(number).key for number in (15, 0, 7, 8, 2, 3)] == ["s1k7", "s0k0", "s0k7", "s1k0", "s0k2", "s0k3"]


def test_failed_rows_and_rows_without_maps_say_why(tmp_path: Path) -> None:
    run = open_run(str(make_run(tmp_path, broken=((1, 2),)).path))
    row = run.row("s1k2")
    assert (row.status, row.error, row.score, row.boxes) == (DECODE_FAILED, "no image", None, None)
    for ask in (row.map, row.mask, lambda: map_in_original(row)):
        with pytest.raises(ValueError, match=r"s1k2 has no ma.*no image"):
            ask()


def test_a_run_without_maps_still_has_its_masks(tmp_path: Path) -> None:
    made = make_run(tmp_path, save_map=False)
    row = open_run(str(made.path)).row("s0k0")
    assert np.array_equal(row.mask(), made.masks["part0/train", "s0k0", 0])
    with pytest.raises(ValueError, match="--no-map"):
        row.map()


def test_an_unfinished_run_gives_what_stands(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    (made.path / "receipts/part1/train.json").unlink()
    run = open_run(str(made.path))
    assert [shard.name for shard in run.shards] == ["part0/train", "part2/train"]
    assert {row.shard for row in run} == {"part0/train", "part2/train"}
    assert run.rows("s1k0") == []
    assert run.row("s2k0").shard == "part2/train"


def test_a_run_with_nothing_done_is_empty(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    (made.path / "receipts/part0/train.json").unlink()
    run = open_run(str(made.path))
    assert (list(run), len(run), run.rows("s0k0")) == ([], 0, [])


def test_an_empty_shard_among_others(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    write_shard(made, 1, 0, [], (4, 4))
    run = open_run(str(made.path))
    assert len(list(run)) == len(run) == 10
    assert run.at(5).key == "s2k0"


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        open_run(str(tmp_path))


def test_data_files_that_are_gone_cut_or_strange_are_named(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=4)
    made.data(0).unlink()
    made.data(1).write_bytes(made.data(1).read_bytes()[:-20])
    other = make_run(tmp_path / "other", shards=1, seed=1)
    made.data(2).write_bytes(other.data(0).read_bytes())
    run = open_run(str(made.path))
    for number, words in [(0, "cannot be read"), (1, "cannot be read"), (2, "fingerprint")]:
        with pytest.raises(ShardError, match=f"part{number}/train.parquet .*{words}.*saltern verify"):
            list(run.read(made.run.shards[number]))
    assert len(list(run.read(made.run.shards[3]))) == 5
    with pytest.raises(ShardError, match="saltern verify"):
        run.rows("s3k0")


def test_a_run_in_another_file_system(tmp_path: Path) -> None:
    """As in an object store, pyarrow.fs reads all files, at paths that begin with a bucket."""
    made = make_run(tmp_path)
    store = Store(str(made.path))
    store.fs, store.path, store.local = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run", False
    run = SaliencyRun("s3://bucket/run", store, made.run, read_receipts(store, made.run))
    assert list(run) == list(open_run(str(made.path)))
    assert run.row("s2k1").index == 1
    made.data(0).unlink()
    with pytest.raises(ShardError, match=r"run/data/part0/train\.parquet .*`saltern verify s3://bucket/run`"):
        list(run)


def test_a_run_survives_pickling(tmp_path: Path) -> None:
    run = open_run(str(make_run(tmp_path).path))
    assert list(pickle.loads(pickle.dumps(run))) == list(run)  # noqa: S301


def test_joined_gives_each_sample_its_rows(tmp_path: Path) -> None:
    made = make_run(tmp_path, targets=2, broken=((0, 1),))
    joined = list(open_run(str(made.path)).joined(made.run.shards[0]))
    assert [(sample.key, len(rows)) for sample, rows in joined] == [(f"s0k{k}", 1 if k == 1 else 2) for k in range(5)]
    assert all(sample.key == row.key for sample, rows in joined for row in rows)
    assert joined[0][0].image == picture(0, *SIZE)


@pytest.mark.parametrize("keys", [["a", "x", "c"], ["a", "b"], ["a", "b", "c", "d"]], ids=["renamed", "fewer", "more"])
def test_a_tar_of_other_samples_is_named(tmp_path: Path, keys: list[str]) -> None:
    made = make_run(tmp_path, shards=1, samples=3)
    shard = made.run.shards[0]
    failed = {"shard": shard.name, "status": DECODE_FAILED, "error": ""}
    rows = [{**failed, "key": key, "index": index} for index, key in enumerate("abc")]
    write_shard(made, 0, 3, rows, (4, 4))
    # The members are small, so that all these tars have the same size, 10,240 bytes.
    write_tar(Path(shard.url), [(key, {"jpg": b"x"}) for key in keys])
    (made.path / "run.json").write_bytes(replace(made.run, shards=[replace(shard, size=10240)]).to_json())
    receipt = made.path / "receipts/part0/train.json"
    receipt.write_bytes(replace(Receipt.from_json(receipt.read_bytes()), size=10240).to_json())
    run = open_run(str(made.path))
    with pytest.raises(ShardError, match=r"part0/train\.parquet does not fit .*train\.tar.*saltern verify"):
        list(run.joined(run.shards[0]))


def test_what_the_extractor_writes_is_read_back(tmp_path: Path) -> None:
    request = ExtractRequest(
        shards=[str(write_shards(tmp_path / "shards", 2, 6))],
        model="making:tiny", method="grad-cam", layer="body", target="top:2", resize=40, crop=32, batch_size=4,
        map_dtype="float32", torch_threads=1,
    )  # fmt: skip
    assert conduct(extraction(request), RunOptions(str(tmp_path / "run"), device="cpu", engine="local")).code == 0
    run = open_run(str(tmp_path / "run"))
    rows = [row for row in run if row.status == OK]
    assert len(rows) > 12
    for row in rows:
        assert row.map().shape == (4, 4)
        assert np.array_equal(row.map("input") >= np.float32(row.mask_threshold), row.mask())
    items = list(SaliencyDataset(run.path))
    assert [(item["key"], item["target"]) for item in items] == [(row.key, row.target) for row in rows]


# Maps over their originals.


def test_a_map_of_places_lands_on_the_places(tmp_path: Path) -> None:
    """A map of each input pixel's x in the original, laid over the original, must give each pixel its own x."""
    for width, height, squash in [(60, 44, False), (44, 61, False), (300, 200, False), (40, 40, False), (90, 33, True)]:
        decoded = decode(picture(0, height, width), Preprocess(40, 32, squash))
        scale_x, scale_y, offset_x, offset_y = decoded.geometry
        x_HW, y_HW = np.meshgrid((np.arange(32) + 0.5) * scale_x + offset_x, (np.arange(32) + 0.5) * scale_y + offset_y)
        for found, scale, places in [
            (over_frame(x_HW.astype(np.float32), (32, 32), list(decoded.geometry), height, width), scale_x, "x"),
            (over_frame(y_HW.astype(np.float32), (32, 32), list(decoded.geometry), height, width).T, scale_y, "y"),
        ]:
            centres = np.broadcast_to(np.arange(found.shape[1]) + 0.5, found.shape)
            seen = np.isfinite(found)
            # Beyond the centres of the outer cells, the map is constant.
            assert np.abs(found - centres)[seen].max() <= scale / 2 + 1e-4, places
            inner = seen & (centres > np.nanmin(found) + 1e-3) & (centres < np.nanmax(found) - 1e-3)
            assert np.abs(found - centres)[inner].max() < 1e-3


@pytest.mark.parametrize("squash", [False, True])
def test_outside_of_the_crop_is_nan(squash: bool) -> None:
    geometry = decode(picture(0, 44, 60), Preprocess(40, 32, squash)).geometry
    found = over_frame(np.ones((4, 4), np.float32), (32, 32), list(geometry), 44, 60)
    y_44, x_60 = np.arange(44) + 0.5, np.arange(60) + 0.5
    inside = np.outer(
        (y_44 >= geometry[3]) & (y_44 < geometry[3] + 32 * geometry[1]),
        (x_60 >= geometry[2]) & (x_60 < geometry[2] + 32 * geometry[0]),
    )
    assert np.array_equal(np.isfinite(found), inside)
    assert inside.all() == squash
    assert (found[inside] == 1).all()


def test_an_untouched_image_gets_its_map_unchanged() -> None:
    map_hw = np.random.default_rng(0).random((32, 32), np.float32)
    assert np.allclose(over_frame(map_hw, (32, 32), [1.0, 1.0, 0.0, 0.0], 32, 32), map_hw, atol=1e-6)
    up = upsample(torch.from_numpy(map_hw)[None], (96, 96))[0].numpy()
    assert np.allclose(over_frame(map_hw, (32, 32), [3.0, 3.0, 0.0, 0.0], 96, 96), up, atol=1e-5)
    assert np.allclose(over_frame(map_hw, (96, 96), [1.0, 1.0, 0.0, 0.0], 96, 96), up, atol=1e-5)


def bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_thresholding_in_the_original_gives_the_mask(tmp_path: Path) -> None:
    for row in open_run(str(make_run(tmp_path, shards=2, grid=(6, 6), discretize="max:0.8").path)):
        map_YX = map_in_original(row)
        assert map_YX.shape == (44, 60)
        found = bounds(np.nan_to_num(map_YX, nan=-9) >= row.mask_threshold)
        expected = original_box(bounds(row.mask()), tuple(row.geometry), 44, 60)
        assert np.abs(np.subtract(found, expected)).max() <= 1  # an input pixel is 1.1 original ones
