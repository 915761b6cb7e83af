"""Boxes from CSV files; those of ILSVRC annotations are in test_pack."""

import json
from pathlib import Path

import pytest

from saltern.pipeline.shards.box_files import open_boxes
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.folder import Image
from saltern.pipeline.shards.pack import pack
from saltern.pipeline.shards.samples import read_samples
from saltern.schemas.errors import UserError


def written(folder: Path, *lines: str) -> Path:
    path = folder / "boxes.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_folder_is_packed_with_the_boxes_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "images/n1").mkdir(parents=True)
    for name in ("a.b.JPEG", "c.jpg", "d.jpg"):
        (tmp_path / "images/n1" / name).write_bytes(b"x")
    lines = ("image,x0,y0,x1,y1", "n1/a.b.JPEG,1,2,30,40", "c,0,0,9,9.0", "n1/a.b.JPEG,5,6,7,8", "other,1,1,2,2")
    packed = pack(tmp_path / "images", tmp_path / "out", boxes=written(tmp_path, *lines), shuffle=None)
    assert packed.unboxed == 1
    (shard,), _ = expand([str(tmp_path / "out")])
    assert [json.loads(sample.members["json"]) for sample in read_samples(shard)] == [
        {"name": "n1", "boxes": [[1, 2, 30, 40], [5, 6, 7, 8]]},
        {"name": "n1", "boxes": [[0, 0, 9, 9]]},
        {"name": "n1"},
    ]


@pytest.mark.parametrize("name", ["n1/a.jpg", "n1/a", "a.jpg", "a"])
def test_an_image_is_found_by_path_or_name(tmp_path: Path, name: str) -> None:
    boxes_of = open_boxes(written(tmp_path, "width,image,x0,y0,x1,y1,height", f"60,{name},1,2,3,4,44"))
    assert boxes_of(Image("n1/a.jpg", "n1/a", "jpg", 0)) == {"boxes": [[1, 2, 3, 4]], "height": 44, "width": 60}
    assert boxes_of(Image("n1/b.jpg", "n1/b", "jpg", 0)) is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("a,1,2,3,4",), "line 1: its first line must name the columns image,x0,y0,x1,y1"),
        (("image,x0,y0,x1,y1", "a,1,2,3,4", "a,1,2,x,4"), "line 3: could not convert"),
        (("image,x0,y0,x1,y1", "a,1,2"), "line 2: an edge or a size is missing"),
        (("image,x0,y0,x1,y1", "a,1,2,3,1e999"), "line 2: "),
        (("image,x0,y0,x1,y1",), "no box in it"),
        (("\ud800",), "line 1: "),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=said) as error:
        open_boxes(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
