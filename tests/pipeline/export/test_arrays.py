"""Arrays of a shard, read by NumPy."""

import json
from pathlib import Path

import numpy as np
from made_run import CROP, make_run

from saltern.pipeline.export.export import export


def test_entries_of_maps_masks_and_rows_have_one_order(tmp_path: Path) -> None:
    made = make_run(tmp_path, targets=2, target="top:2", broken=((0, 0), (1, 2)))
    export(str(made.path), "npy", str(tmp_path / "out"))
    for shard in made.run.shards:
        stem = str(tmp_path / "out" / shard.name)
        map_Rhw, mask_RHW = (np.load(f"{stem}.{name}.npy", mmap_mode="r") for name in ("map", "mask"))
        rows = json.loads(Path(f"{stem}.json").read_bytes())
        assert map_Rhw.dtype == np.float32
        assert map_Rhw.shape == (len(rows), 4, 4)
        assert mask_RHW.dtype == np.bool_
        assert mask_RHW.shape == (len(rows), CROP, CROP)
        for row, map_hw, mask_HW in zip(rows, map_Rhw, mask_RHW, strict=True):
            if row["status"] != "ok":
                assert np.isnan(map_hw).all()
                assert not mask_HW.any()
                continue
            place = row["shard"], row["key"], row["target"] - row["index"]
            assert np.array_equal(map_hw, made.maps[place])
            assert np.array_equal(mask_HW, made.masks[place])


def test_what_no_row_has_has_no_file(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=2, samples=1, save_map=False, broken=((1, 0),))
    export(str(made.path), "npy", str(tmp_path / "out"))
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("part*/*")}
    assert names == {"part0/train.mask.npy", "part0/train.json", "part1/train.json"}
