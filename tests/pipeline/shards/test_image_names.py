"""The names of image files are those in the tar, for each sample of `read_samples`."""

import gzip
from pathlib import Path

from tars import shard_at, tar_bytes

from saltern.pipeline.shards.samples import list_images, read_samples
from saltern.schemas.config import Members

MEMBERS = [
    *(
        ("n01/a.JPEG", b"1"),
        ("n01/a.cls", b"0"),
        ("b.txt", b"x"),
        ("c.mask.png", b"2"),
        ("c.jpg", b"3"),
        ("c.png", b"4"),
    ),
    *(("d.jpg", b"5"), ("d.jpg", b"6"), ("\udce9.Jpg", b"7")),
]


def test_each_sample_has_its_image_as_the_tar_spells_it(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.tar", tar_bytes(MEMBERS))
    found = list(list_images(shard))
    names = ["n01/a.JPEG", None, "c.jpg", "d.jpg", "d.jpg", "\\xe9.Jpg"]
    assert found == list(zip(["n01/a", "b", "c", "d", "d", "\\xe9"], names, strict=True))
    assert [key for key, _ in found] == [sample.key for sample in read_samples(shard)]
    assert [name is None for _, name in found] == [sample.image is None for sample in read_samples(shard)]


def test_a_named_member_is_the_image_and_a_limit_holds(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.tar", tar_bytes(MEMBERS), take=3)
    assert list(list_images(shard, named=Members("mask.png"))) == [("n01/a", None), ("b", None), ("c", "c.mask.png")]


def test_a_compressed_tar_is_read_too(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(MEMBERS)))
    assert len(list(list_images(shard))) == 6
