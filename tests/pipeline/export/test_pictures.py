"""Grey pictures over the originals, and the names of their files."""

import os
from pathlib import Path

import numpy as np
import pytest
from made_run import make_run
from naive_rows import over_original
from PIL import Image

from saltern.pipeline.export.export import export
from saltern.pipeline.export.facts import safe
from saltern.pipeline.runs.reader import open_run


def test_maps_and_masks_lie_over_the_original(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=3, broken=((0, 1),))
    export(str(made.path), "png", str(tmp_path / "out"))
    for row in open_run(str(made.path)):
        stem = tmp_path / "out" / row.shard / row.key
        if row.status != "ok":
            assert not list(stem.parent.glob(f"{row.key}.*"))
            continue
        grey_YX, mask_YX = (np.asarray(Image.open(f"{stem}.{name}.png")) for name in ("map", "mask"))
        map_hw = row.map()
        scale_x, scale_y, *offset = row.geometry
        # A cell of the map's grid covers several pixels of the input.
        cells = 32 / map_hw.shape[1], 32 / map_hw.shape[0]
        expected = over_original(map_hw, (scale_x * cells[0], scale_y * cells[1], *offset), 44, 60)
        expected = np.nan_to_num((expected - map_hw.min()) / np.ptp(map_hw) * 255)
        assert np.abs(grey_YX - expected).max() <= 0.51
        assert np.array_equal(mask_YX > 0, over_original(row.mask(), row.geometry, 44, 60) >= 0.5)
        assert set(np.unique(mask_YX)) <= {0, 255}


def test_several_targets_are_numbered_by_rank(tmp_path: Path) -> None:
    made = make_run(tmp_path, shards=1, samples=1, targets=2, target="top:2")
    export(str(made.path), "png", str(tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out" / "part0/train").iterdir())
    assert names == ["s0k0.map.0.png", "s0k0.map.1.png", "s0k0.mask.0.png", "s0k0.mask.1.png"]


ODD = [
    *(
        "a",
        "a/b",
        "../a",
        "..",
        "/a",
        "/a/",
        "//",
        "a//b",
        "./a",
        ".a",
        "%2Ea",
        "%",
        "",
        "a\\b",
        "a%5Cb",
        "ü",
        "\n",
        "a b",
    ),
    *("x" * 300, "x" * 301, "é" * 200, "CON", "a:b", "a*b", "~", "~/a", "-rf", "a\0b", "a\x1b[2J"),
]


def test_keys_are_names_of_files_below_the_folder_each_its_own() -> None:
    names = [safe(key) for key in ODD]
    assert len(set(names)) == len(ODD)
    for name in names:
        assert os.path.normpath(f"/out/{name}") == f"/out/{name}"
        assert all(0 < len(part.encode()) <= 200 and part.isprintable() for part in name.split("/"))
    assert safe("n01440764/n01440764_18") == "n01440764/n01440764_18"


@pytest.mark.parametrize("key", ["../../up", "/root", "a\\..\\b"])
def test_a_key_leads_out_of_no_folder(key: str) -> None:
    assert ".." not in safe(key).split("/")
    assert not safe(key).startswith("/")
