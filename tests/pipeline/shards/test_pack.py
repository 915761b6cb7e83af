"""A packed image folder is read back by Saltern and by webdataset."""

import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from saltern.pipeline.shards.box_files import read_ilsvrc
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.pack import pack
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.schemas.errors import UserError

Touch = Callable[..., Path]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """Return a function that writes files to tmp_path/images, with their names as content, and returns the folder."""

    def make(*names: str) -> Path:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        return folder

    return make


def samples(out: Path) -> list[Sample]:
    shards, _ = expand([str(out)])
    found = [sample for shard in shards for sample in read_samples(shard)]
    assert [sample.problem for sample in found] == [None] * len(found)
    return found


def refused(folder: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        pack(folder, out, **options)
    assert not [path for path in out.glob("*") if path.suffix == ".tar" or path.name.startswith(".")] or out == folder
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_folder_a_class(tmp_path: Path, touch: Touch) -> None:
    folder = touch("b/2.jpg", "b/1.JPEG", "a/x.png", "c/deep/er/y.webp", "a/notes.txt", "b/.hidden.jpg", "list.csv")
    (folder / "aa").mkdir()
    out = tmp_path / "out"
    packed = pack(folder, out, per_shard=3, shuffle=None)
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert (packed.shards, packed.samples, packed.classes, packed.bytes, packed.unboxed) == (2, 4, 3, size, 0)
    assert sorted(path.name for path in out.iterdir()) == ["classes.json", "shard-000000.tar", "shard-000001.tar"]
    assert json.loads((out / "classes.json").read_text()) == {"0": "a", "1": "b", "2": "c"}
    found = samples(out)
    assert [(sample.key, sample.label) for sample in found] == [("a/x", 0), ("b/1", 1), ("b/2", 1), ("c/deep/er/y", 2)]
    assert [sample.image for sample in found] == [b"a/x.png", b"b/1.JPEG", b"b/2.jpg", b"c/deep/er/y.webp"]
    assert [json.loads(sample.members["json"]) for sample in found] == [{"name": name} for name in "abbc"]


def test_a_flat_folder_has_no_classes(tmp_path: Path, touch: Touch) -> None:
    packed = pack(touch("b.jpg", "a.png"), tmp_path / "out")
    assert (packed.samples, packed.classes) == (2, 0)
    assert [(sample.key, sorted(sample.members)) for sample in samples(tmp_path / "out")] == [
        ("a", ["png"]),
        ("b", ["jpg"]),
    ]


def test_webdataset_reads_the_same(tmp_path: Path, touch: Touch) -> None:
    pack(touch("k.1/a.v1.jpg", "k.1/é.jpg", f"k.1/{'n' * 200}.jpg"), tmp_path / "out", shuffle=None)
    path = tmp_path / "out" / "shard-000000.tar"
    with open(path, "rb") as stream:
        theirs = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    assert [(other["__key__"], other["jpg"], other["cls"]) for other in theirs] == [
        (sample.key, sample.image, b"0") for sample in samples(tmp_path / "out")
    ]
    assert [other["__key__"] for other in theirs] == ["k.1/a-v1", f"k.1/{'n' * 200}", "k.1/é"]


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path, touch: Touch) -> None:
    folder = touch(*(f"{name}/{i}.jpg" for name in "ab" for i in range(5)))
    pack(folder, tmp_path / "one", per_shard=4)
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    pack(folder, tmp_path / "two", per_shard=4)
    assert (tmp_path / "one" / "classes.json").read_bytes() == (tmp_path / "two" / "classes.json").read_bytes()
    names = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        with tarfile.open(tmp_path / "one" / name) as tar:
            assert {(member.mtime, member.uname, member.uid) for member in tar} == {(0, "bigdata", 0)}


def test_real_photographs(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "imagenet-sample" / "imagenet-sample-000000.tar"
    (given,), _ = expand([str(source)])
    originals = {}
    for sample in read_samples(given):
        known = json.loads(sample.members["json"])
        path = tmp_path / "images" / known["wnid"] / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert sample.image is not None
        path.write_bytes(sample.image)
        originals[f"{known['wnid']}/{sample.key}"] = sample.image
    packed = pack(tmp_path / "images", tmp_path / "out", per_shard=30)
    assert (packed.samples, packed.shards, packed.classes) == (100, 4, 100)
    assert {sample.key: sample.image for sample in samples(tmp_path / "out")} == originals


# Classes and order


def test_a_seed_gives_the_order_of_the_samples(tmp_path: Path, touch: Touch) -> None:
    folder = touch(*(f"{name}/{number}.jpg" for name in "abcde" for number in range(40)))
    orders = {}
    for seed in (None, 0, 1):
        pack(folder, tmp_path / str(seed), per_shard=20, shuffle=seed)
        orders[seed] = [(sample.key, sample.label) for sample in samples(tmp_path / str(seed))]
    assert orders[None] == sorted(orders[None])
    assert len({tuple(order) for order in orders.values()}) == 3
    for seed in (0, 1):
        assert sorted(orders[seed]) == orders[None]
        for start in range(0, 200, 20):  # no shard has one class
            assert len({label for _, label in orders[seed][start : start + 20]}) > 2


@pytest.mark.slow
def test_folders_get_the_numbers_of_imagenet(tmp_path: Path, touch: Touch) -> None:
    folder, out = touch("n15075141/a.jpg", "Tiger_Cat/b.jpg", "n01440764-tench/c.jpg"), tmp_path / "out"
    pack(folder, out, classes="imagenet")
    found = {sample.key: (sample.label, json.loads(sample.members["json"])["name"]) for sample in samples(out)}
    assert found == {
        "n15075141/a": (999, "toilet tissue"),
        "Tiger_Cat/b": (282, "tiger cat"),
        "n01440764-tench/c": (0, "tench"),
    }
    assert json.loads((out / "classes.json").read_text()) == {"0": "tench", "282": "tiger cat", "999": "toilet tissue"}


def test_a_second_folder_gets_the_numbers_of_the_first(tmp_path: Path, touch: Touch) -> None:
    pack(touch("a/1.jpg", "b/1.jpg", "c/1.jpg"), tmp_path / "train")
    (tmp_path / "val" / "c").mkdir(parents=True)
    (tmp_path / "val" / "c" / "2.jpg").write_bytes(b"c")
    pack(tmp_path / "val", tmp_path / "out", classes=str(tmp_path / "train" / "classes.json"))
    assert [sample.label for sample in samples(tmp_path / "out")] == [2]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["tench/a.jpg", "my bed/b.jpg"], "1 class folders ('my bed'): not one of its 1000 classes"),
        (["tench/a.jpg", "n01440764/b.jpg"], "'n01440764' and 'tench' in"),
        (["a.jpg"], "flat folder: not one of its 1000 classes"),
    ],
)
def test_folders_that_are_no_class_are_refused(tmp_path: Path, touch: Touch, names: list[str], reason: str) -> None:
    assert reason in refused(touch(*names), tmp_path / "out", classes="imagenet")
    assert not (tmp_path / "out").exists()


# Keys


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.jpg", "a.png"], ["a-jpg", "a-png"]),
        (["a.jpg", "a.jpeg", "b.jpg"], ["a-jpeg", "a-jpg", "b"]),
        (["a.b.jpg", "a.c.jpg"], ["a-b", "a-c"]),
        (["a.b.jpg", "a-b.png"], ["a-b-png", "a-b-jpg"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a", "y/a"]),
        (["a..jpg", "b b.jpg", "ü.jpg"], ["a-", "b b", "ü"]),
    ],
)
def test_keys_are_unique(tmp_path: Path, touch: Touch, names: Sequence[str], keys: list[str]) -> None:
    pack(touch(*names), tmp_path / "out", shuffle=None)
    assert [sample.key for sample in samples(tmp_path / "out")] == keys


@pytest.mark.parametrize("names", [("a.jpg", "a.png", "a-jpg.jpg"), ("a.jpg", "a.JPG")])
def test_keys_that_cannot_be_told_apart(tmp_path: Path, touch: Touch, names: tuple[str, ...]) -> None:
    reason = refused(touch(*names), tmp_path / "out")
    assert names[-1] in reason
    assert "'a-jpg'" in reason


@pytest.mark.parametrize("name", ["__x__/a.jpg", os.fsdecode(b"\xff.jpg"), "a\n.d/b\n.jpg"])
def test_names_that_make_no_key(tmp_path: Path, name: str) -> None:
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert "rename" in refused(tmp_path / "images", tmp_path / "out")


# Links. What else a folder may hold is in test_folder.py.


def test_symbolic_links_are_followed_but_not_in_circles(tmp_path: Path, touch: Touch) -> None:
    folder = touch("a/1.jpg")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.jpg").write_bytes(b"2")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "loop").symlink_to(folder / "a")
    (folder / "a" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    pack(folder, tmp_path / "out", shuffle=None)
    assert [(sample.key, sample.image) for sample in samples(tmp_path / "out")] == [
        ("a/1", b"a/1.jpg"),
        ("a/3", b"2"),
        ("b/2", b"2"),
    ]


# Boxes

XML = """<annotation><folder>val</folder><filename>x</filename><size><width>500</width><height>375</height>
<depth>3</depth></size>{}</annotation>"""
CORNERS = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
OBJECT = f"<object><name>n01751748</name><bndbox>{CORNERS}</bndbox></object>"


def annotate(path: Path, *boxes: tuple[int, int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(XML.format("".join(OBJECT.format(*box) for box in boxes)))


@pytest.mark.parametrize("place", ["Annotation/{0}", "{0}", "", "Annotation"])
def test_boxes_from_each_layout(tmp_path: Path, touch: Touch, place: str) -> None:
    folder, boxes = touch("n1/a.b.JPEG", "n2/c.JPEG", "n2/d.JPEG"), tmp_path / "boxes"
    annotate(boxes / place.format("n1") / "a.b.xml", (1, 2, 30, 40), (5, 6, 499, 374))
    annotate(boxes / place.format("n2") / "c.xml")
    packed = pack(folder, tmp_path / "out", boxes=boxes, shuffle=None)
    assert packed.unboxed == 1
    assert [json.loads(sample.members["json"]) for sample in samples(tmp_path / "out")] == [
        {"name": "n1", "boxes": [[1, 2, 30, 40], [5, 6, 499, 374]], "height": 375, "width": 500},
        {"name": "n2", "boxes": [], "height": 375, "width": 500},
        {"name": "n2"},
    ]


def test_boxes_of_a_flat_folder(tmp_path: Path, touch: Touch) -> None:
    annotate(tmp_path / "boxes" / "a.xml", (1, 2, 3, 4))
    pack(touch("a.jpg", "b.jpg"), tmp_path / "out", boxes=tmp_path / "boxes", shuffle=None)
    first, second = samples(tmp_path / "out")
    assert json.loads(first.members["json"])["boxes"] == [[1, 2, 3, 4]]
    assert "json" not in second.members


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation>",
        "not xml",
        "<annotation/>",
        XML.format("<object><name>x</name></object>"),
        XML.format(OBJECT.format(1, 2, "x", 4)),
        XML.format(OBJECT.format(1, 2, "1e999", 4)),
        XML.format(OBJECT.format(1, 2, "nan", 4)),
        BOMB,
        XML.format(" " * 2**20),
        '<?xml version="1.0" encoding="utf-16"?>' + XML.format("\0"),
        '<?xml version="1.0" encoding="no-such"?>' + XML.format(""),
    ],
)
def test_a_damaged_annotation(tmp_path: Path, touch: Touch, text: str) -> None:
    path = tmp_path / "boxes" / "b.xml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=r"b\.xml"):
        read_ilsvrc(path)
    out = tmp_path / "out"
    assert str(path) in refused(touch(*(f"{name}.jpg" for name in "abc")), out, boxes=path.parent, per_shard=1)
    assert list(out.iterdir()) == []


# Errors


def test_an_output_folder_with_shards(tmp_path: Path, touch: Touch) -> None:
    folder, out = touch("a.jpg"), tmp_path / "out"
    pack(folder, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match=r"shard-000000\.tar.*another folder"):
        pack(folder, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_files_in_the_output_folder_stay(tmp_path: Path, touch: Touch) -> None:
    out = tmp_path / "out"
    (out / ".tmp-pack").mkdir(parents=True)  # left by a killed process
    (out / ".tmp-pack" / "shard-000009.tar").write_bytes(b"")
    (out / "README").write_text("mine")
    pack(touch("a.jpg"), out)
    assert sorted(path.name for path in out.iterdir()) == ["README", "shard-000000.tar"]


def test_a_folder_without_images(tmp_path: Path, touch: Touch) -> None:
    assert "no image in 2 files" in refused(touch("a.txt", "k/b.jpg.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_next_to_class_folders(tmp_path: Path, touch: Touch) -> None:
    assert "1 image (z.jpg, ...) next to 2 folders" in refused(touch("a/1.jpg", "b/2.jpg", "z.jpg"), tmp_path / "out")


def test_wrong_folders(tmp_path: Path, touch: Touch) -> None:
    folder = touch("a.jpg")
    assert "no such folder" in refused(tmp_path / "none", tmp_path / "out")
    assert "no such folder" in refused(folder, tmp_path / "out", boxes=tmp_path / "none")
    assert "no .xml" in refused(folder, tmp_path / "out", boxes=folder)
    assert "lies in" in refused(folder, folder)
    assert "lies in" in refused(folder, folder / "out")
    assert "--per-shard 0" in refused(folder, tmp_path / "out", per_shard=0)
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(folder, tmp_path / "file")


def test_an_interruption_leaves_nothing(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = touch(*(f"{i}.jpg" for i in range(9))), tmp_path / "out"
    read_bytes, calls = Path.read_bytes, []

    def interrupted(path: Path) -> bytes:
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, per_shard=2)
    assert list(out.iterdir()) == []
