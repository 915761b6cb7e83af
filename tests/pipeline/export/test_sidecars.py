"""Sidecar tars are read in step with the input shards by webdataset."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from made_run import CROP, Made, make_run, write_shard
from PIL import Image
from tars import tar_bytes

from saltern.pipeline.export.export import export
from saltern.schemas.run import Shard
from saltern.schemas.saliency import DECODE_FAILED

# webdataset leaves closing to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def samples(path: Path) -> Iterator[dict[str, Any]]:
    return iter(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))


def in_step(made: Made, out: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for shard in made.run.shards:
        yield from zip(samples(Path(shard.url)), samples(out / f"{shard.name}.tar"), strict=True)


def test_they_have_equal_keys_in_equal_order_with_the_rows_maps_and_masks(tmp_path: Path) -> None:
    made = make_run(tmp_path, broken=((1, 2),))
    done = export(str(made.path), "wds", str(tmp_path / "out"))
    assert (done.shards, done.rows, done.failures) == (3, 15, {})
    seen = []
    for given, found in in_step(made, tmp_path / "out"):
        assert found["__key__"] == given["__key__"]
        facts = json.loads(found["saliency.json"])
        assert (facts["key"], facts["label"]) == (given["__key__"], int(given["cls"]))
        seen.append(facts["status"])
        if facts["status"] == DECODE_FAILED:
            assert set(found) & {"map.npy", "mask.png"} == set()
            continue
        place = facts["shard"], facts["key"], 0
        assert np.array_equal(np.load(io.BytesIO(found["map.npy"])), made.maps[place])
        mask_HW = np.asarray(Image.open(io.BytesIO(found["mask.png"])))
        assert np.array_equal(mask_HW, made.masks[place] * np.uint8(255))
        assert (facts["target"], len(facts["boxes"]), len(facts["geometry"])) == (int(given["cls"]), 1, 4)
        assert (facts["input_height"], facts["input_width"], facts["image_height"]) == (CROP, CROP, 44)
    assert len(seen) == 15
    assert seen.index(DECODE_FAILED) == 7


def test_webdatasets_own_decoders_read_them(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    export(str(made.path), "wds", str(tmp_path / "out"))
    tar = tmp_path / "out" / "part0/train.tar"
    found = next(iter(wds.WebDataset(str(tar), shardshuffle=False).decode("l8")))
    assert found["map.npy"].dtype == np.float32
    assert found["mask.png"].shape == (CROP, CROP)
    assert found["saliency.json"]["status"] == "ok"


def test_several_targets_are_numbered_by_rank(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, targets=2, target="top:2", broken=((0, 0),))
    export(str(made.path), "wds", str(tmp_path / "out"))
    first, second, *_ = (found for _, found in in_step(made, tmp_path / "out"))
    assert set(first) - {"__key__", "__url__", "__local_path__"} == {"saliency.0.json"}
    names = {f"{name}.{rank}.{ext}" for name, ext in (("map", "npy"), ("mask", "png"), ("saliency", "json"))
             for rank in (0, 1)}  # fmt: skip
    assert set(second) - {"__key__", "__url__", "__local_path__"} == names
    for rank in (0, 1):
        expected = made.maps["part0/train", "s0k1", rank]
        assert np.array_equal(np.load(io.BytesIO(second[f"map.{rank}.npy"])), expected)
        assert json.loads(second[f"saliency.{rank}.json"])["target"] == 1 + rank


def test_a_run_without_maps_has_masks_alone(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, save_map=False)
    export(str(made.path), "wds", str(tmp_path / "out"))
    for _, found in in_step(made, tmp_path / "out"):
        assert {"mask.png", "saliency.json"} <= set(found)
        assert "map.npy" not in found


ODD = ["plain", "n01/a b", "café/ü", "../up", "/root/x", "a" * 150 + "/" + "b" * 90, "__meta__/m", "\udce9t\udce9", "z"]


def test_odd_keys_are_those_of_the_tar(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, long names, folders, and files that webdataset skips: in both or in neither."""
    made = make_run(tmp_path, shards=1, samples=1)
    tar = Path(made.run.shards[0].url)
    tar.write_bytes(tar_bytes([(f"{key}.txt", b"no image") for key in ODD]))
    old = made.run.shards[0]
    made.run.shards[0] = Shard(old.name, old.url, tar.stat().st_size)
    (made.path / "run.json").write_bytes(made.run.to_json())
    stored = [key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for key in ODD]
    rows = [
        {"key": key, "shard": old.name, "index": index, "status": "missing_image", "error": "x"}
        for index, key in enumerate(stored)
    ]
    write_shard(made, 0, len(ODD), rows, (4, 4))
    export(str(made.path), "wds", str(tmp_path / "out"))
    pairs = list(in_step(made, tmp_path / "out"))
    assert [given["__key__"] for given, _ in pairs] == [found["__key__"] for _, found in pairs]
    assert len(pairs) == len(ODD) - 1  # webdataset skips __meta__
    with tarfile.open(tmp_path / "out" / f"{old.name}.tar") as there:
        assert there.getnames() == [f"{key}.saliency.json" for key in ODD]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1)
    contents = []
    for name in ("one", "two"):
        export(str(made.path), "wds", str(tmp_path / name))
        contents.append((tmp_path / name / "part0/train.tar").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_maps_are_float32_in_the_methods_unit(tmp_path: Path, dtype: str) -> None:
    made = make_run(tmp_path, shards=1, samples=1, map_dtype=dtype)
    export(str(made.path), "wds", str(tmp_path / "out"))
    ((_, found),) = in_step(made, tmp_path / "out")
    map_hw, expected = np.load(io.BytesIO(found["map.npy"])), made.maps["part0/train", "s0k0", 0]
    assert map_hw.dtype == np.float32
    assert np.allclose(map_hw, expected, atol=np.ptp(expected) / 255)
