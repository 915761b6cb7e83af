"""The user's SHARDS are expanded, on a local disk and in an object store."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from s3server import S3, used_server
from tars import samples, tar_bytes

from saltern.pipeline.shards import expand as module
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys, read_samples
from saltern.pipeline.storage import filesystem
from saltern.schemas.errors import UserError

Touch = Callable[..., None]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """Return a function that writes files below tmp_path, each as many bytes long as its position."""

    def make(*names: str) -> None:
        for size, name in enumerate(names, 1):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))

    return make


def found(*patterns: str, hints: int = 0) -> list[str]:
    """Return the last components of the URLs."""
    shards, said = expand(patterns)
    assert len(said) == hints
    return [os.path.basename(shard.url) for shard in shards]


def refused(*patterns: str) -> str:
    with pytest.raises(UserError) as error:
        expand(patterns)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_file(tmp_path: Path, touch: Touch) -> None:
    touch("a/x.tar")
    (shard,), hints = expand([str(tmp_path / "a" / "x.tar")])
    assert (shard.name, shard.url, shard.size, shard.take) == ("x", str(tmp_path / "a" / "x.tar"), 1, None)
    assert hints == []


def test_relative_paths_become_absolute(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a/x.tar", "a/y.tar")
    monkeypatch.chdir(tmp_path / "a")
    shards, _ = expand(["./x.tar", "../a/y.tar"])
    assert [shard.url for shard in shards] == [str(tmp_path / "a" / "x.tar"), str(tmp_path / "a" / "y.tar")]


def test_braces_keep_their_order(tmp_path: Path, touch: Touch) -> None:
    touch(*(f"t-{i:06d}.tar" for i in range(12)))
    assert found(f"{tmp_path}/t-{{000009..000011}}.tar", f"{tmp_path}/t-{{000003,000001}}.tar") == [
        f"t-{i:06d}.tar" for i in (9, 10, 11, 3, 1)
    ]


def test_globs_are_sorted(tmp_path: Path, touch: Touch) -> None:
    touch("b.tar", "a.tar", "c.tgz", "d.tar.gz", "README", "sub/e.tar", "sub/deep/f.tar", ".hidden.tar")
    assert found(f"{tmp_path}/*") == ["a.tar", "b.tar", "c.tgz", "d.tar.gz", "f.tar", "e.tar"]
    assert found(f"{tmp_path}/[ab].tar") == ["a.tar", "b.tar"]
    assert found(f"{tmp_path}/?.t*") == ["a.tar", "b.tar", "c.tgz", "d.tar.gz"]
    assert found(f"{tmp_path}/**/*.tar") == ["a.tar", "b.tar", "f.tar", "e.tar"]


def test_a_folder_gives_all_tars_below(tmp_path: Path, touch: Touch) -> None:
    touch("b.tar", "a.tar", "c.tgz", "x.jpg", "sub/e.tar.gz", "sub/README", ".tmp-pack/f.tar")
    (tmp_path / "unpacked.tar").mkdir()
    assert found(str(tmp_path)) == ["a.tar", "b.tar", "c.tgz", "e.tar.gz"]


def test_a_list_in_a_file(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a.tar", "b.tar", "c1.tar", "c2.tar")
    (tmp_path / "list.txt").write_text("\ufeff# of today\n\n b.tar \n  # a.tar\nc{1..2}.tar\n")
    monkeypatch.chdir(tmp_path)
    assert found("@list.txt", "a.tar") == ["b.tar", "c1.tar", "c2.tar", "a.tar"]


def test_names_with_characters_of_patterns(tmp_path: Path, touch: Touch) -> None:
    touch("[old]/a{1}.tar", "[old]/b*.tar", "[old]/c.tar", "[old]/sub/d.tar")
    for name in ("a{1}.tar", "b*.tar"):
        assert found(f"{tmp_path}/[old]/{name}") == [name]
    assert found(f"{tmp_path}/[old]") == ["a{1}.tar", "b*.tar", "c.tar", "d.tar"]


def test_the_same_shard_twice_counts_once(tmp_path: Path, touch: Touch) -> None:
    touch("a/x.tar", "a/y.tar", "a/z.tar")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    os.link(tmp_path / "a" / "z.tar", tmp_path / "hard.tar")  # a hard link is another shard
    shards, hints = expand([f"{tmp_path}/a/y.tar", f"{tmp_path}/a/*.tar", str(tmp_path / "hard.tar")])
    assert [os.path.basename(shard.url) for shard in shards] == ["y.tar", "x.tar", "z.tar", "hard.tar"]
    assert len(hints) == 1
    assert f"{tmp_path}/a/y.tar is named more than once" in hints[0]
    shards, hints = expand([str(tmp_path)])
    assert [os.path.basename(shard.url) for shard in shards] == ["x.tar", "y.tar", "z.tar", "hard.tar"]
    assert len(hints) == 2
    assert hints[0].startswith(f"{tmp_path}/a/loop is a link to a folder above it")


# Errors


@pytest.mark.parametrize("name", ["x.tar", "no/such/folder", "[x"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in refused(str(tmp_path / name))


def test_missing_shards_of_braces_are_counted(tmp_path: Path, touch: Touch) -> None:
    touch("t-0.tar", "t-1.tar", "t-3.tar")
    reason = refused(f"{tmp_path}/t-{{0..4}}.tar")
    assert "lacks 2 of its 5 shards" in reason
    assert f"the first is {tmp_path}/t-2.tar" in reason


def test_a_glob_that_matches_nothing(tmp_path: Path, touch: Touch) -> None:
    touch("a.tar", "b.jpg")
    for pattern in ("c*.tar", "*.jpg", "**/z.tar"):
        assert f"{tmp_path}/{pattern}: matches no file" in refused(f"{tmp_path}/*.tar", f"{tmp_path}/{pattern}")


def test_a_folder_without_tars(tmp_path: Path, touch: Touch) -> None:
    touch("images/b.jpg")
    assert "saltern pack" in refused(str(tmp_path / "images"))


@pytest.mark.parametrize("pattern", ["http://host/x.tar", "pipe:curl x", "https://host/{0..9}.tar", "ftp://a"])
def test_other_schemes(pattern: str) -> None:
    assert "s3://" in refused(pattern)


def test_unbalanced_braces(tmp_path: Path) -> None:
    assert "braces do not match" in refused(f"{tmp_path}/t-{{0..4.tar")


def test_an_empty_pattern() -> None:
    assert "variable of the shell" in refused("")


def test_a_missing_list(tmp_path: Path) -> None:
    assert "list of shards" in refused(f"@{tmp_path}/list.txt")


def test_names_that_are_no_text(tmp_path: Path, touch: Touch) -> None:
    touch("a.tar")
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(b"")
    assert "not UTF-8" in refused(str(tmp_path))
    assert found(f"{tmp_path}/a.tar") == ["a.tar"]  # other files in its folder do not matter


# Hints


def test_one_of_many_siblings(tmp_path: Path, touch: Touch) -> None:
    touch(*(f"in1k-train-{i:03d}.tar" for i in range(20)), "in1k-val-000.tar", "index.json")
    _, (hint,) = expand([f"{tmp_path}/in1k-train-004.tar"])
    assert hint == (
        f"in1k-train-004.tar is 1 of 20 sibling shards; for all of them: '{tmp_path}/in1k-train-{{000..019}}.tar'"
    )
    assert len(expand([hint.split("'")[1]])[0]) == 20
    assert len(expand([f"{tmp_path}/in1k-train-00[4].tar"])[1]) == 1
    assert expand([f"{tmp_path}/in1k-train-00{{4,5}}.tar"])[1] == []
    assert expand([f"{tmp_path}/in1k-val-000.tar"])[1] == []


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["a-1.tar", "a-2.tar", "a-10.tar"], "a-*.tar"),
        (["a-08.tar", "a-09.tar", "a-10.tar"], "a-{08..10}.tar"),
        ([f"a-{i}.tar" for i in range(12)], "a-{0..11}.tar"),
        (["a-0.tar", "a-2.tar"], "a-*.tar"),
        (["a-0-0.tar", "a-1-1.tar"], "a-*-*.tar"),
        (["1a-00.tar", "1a-01.tar"], "1a-{00..01}.tar"),
    ],
)
def test_the_hint_names_all_siblings(tmp_path: Path, touch: Touch, names: list[str], pattern: str) -> None:
    touch(*names)
    _, (hint,) = expand([f"{tmp_path}/{names[0]}"])
    assert hint.endswith(f"'{tmp_path}/{pattern}'")
    assert sorted(found(f"{tmp_path}/{pattern}")) == sorted(names)


# Names


def names(tmp_path: Path) -> dict[str, str]:
    shards, _ = expand([str(tmp_path)])
    return {os.path.relpath(shard.url, tmp_path): shard.name for shard in shards}


def test_a_name_is_the_path_below_the_common_folder(tmp_path: Path, touch: Touch) -> None:
    touch("d/train/0.tar", "d/train/1.tar", "d/val/0.tar")
    assert names(tmp_path) == {"d/train/0.tar": "train/0", "d/train/1.tar": "train/1", "d/val/0.tar": "val/0"}
    touch("d/train-extra/0.tar")
    assert names(tmp_path)["d/train-extra/0.tar"] == "train-extra/0"
    shards, _ = expand([f"{tmp_path}/d/train"])
    assert [shard.name for shard in shards] == ["0", "1"]


def test_endings_keep_names_apart(tmp_path: Path, touch: Touch) -> None:
    touch("a.tar", "a.tar.gz", "a.tgz", "a.b.tar")
    assert sorted(names(tmp_path).values()) == ["a", "a.b", "a.tar.gz", "a.tgz"]


def test_names_that_collide(tmp_path: Path, touch: Touch) -> None:
    touch("a.tar", "a")
    reason = refused(f"{tmp_path}/a.tar", f"{tmp_path}/a")
    assert f"{tmp_path}/a.tar and {tmp_path}/a would both get the name 'a'" in reason
    touch("k=v/b.tar", "k-v/b.tar")
    assert "'k-v/b'" in refused(f"{tmp_path}/k*")


def test_names_are_read_back_by_arrow_and_duckdb(tmp_path: Path, touch: Touch) -> None:
    odd = [
        "_a.tar",
        "_b/c.tar",
        "year=2024/d.tar",
        "split=train=x/e.tar",
        "f g.tar",
        "ü/h.tar",
        "i[1]*.tar",
        "j%20.tar",
    ]
    touch(*(f"in/{name}" for name in odd), "in/.k.tar", "in/..l.tar", "in/.m/n.tar")
    patterns = [f"{tmp_path}/in/{name}" for name in (".k.tar", "..l.tar", ".m/n.tar")]
    shards, _ = expand([str(tmp_path / "in"), *patterns])
    assert len(shards) == 11
    for shard in shards:
        path = tmp_path / "data" / f"{shard.name}.parquet"
        assert path.resolve().is_relative_to(tmp_path / "data")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"shard": [shard.name]}), path)
    wanted = sorted(shard.name for shard in shards)
    table = ds.dataset(tmp_path / "data", partitioning="hive").to_table()
    assert table.schema.names == ["shard"]
    assert sorted(table["shard"].to_pylist()) == wanted
    rows = duckdb.sql(f"SELECT * FROM read_parquet('{tmp_path}/data/**/*.parquet')").fetchall()  # noqa: S608
    assert sorted(rows) == [(name,) for name in wanted]


def test_many_flat_names_get_sub_folders(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (module.FLAT, module.BUCKET) == (10_000, 1_000)
    monkeypatch.setattr(module, "FLAT", 1_000)
    monkeypatch.setattr(module, "BUCKET", 100)
    touch("many/00000.tar", *(f"few/{i}.tar" for i in range(3)))
    for i in range(1_200):
        os.close(os.open(tmp_path / f"many/{i:05d}.tar", os.O_CREAT))
    made = names(tmp_path)
    assert made["few/2.tar"] == "few/2"
    many = [name for path, name in made.items() if path.startswith("many")]
    folders = Counter(name.rpartition("/")[0] for name in many)
    assert len(folders) == 16
    assert all(folder.startswith("many/") for folder in folders)
    assert max(folders.values()) < 150
    assert len(set(many)) == 1_200
    again, _ = expand([f"{tmp_path}/many/{{01199..00000}}.tar"])
    assert {f"many/{shard.name}" for shard in again} == set(many)  # independent of the order and of the other shards


# Object stores


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with used_server(monkeypatch) as server:
        yield server


def test_patterns_in_an_object_store(store: S3) -> None:
    for i in range(12):
        store.objects[f"d/t-{i:02d}.tar"] = bytes(i)
    store.objects |= {"d/README": b"x", "d/sub/e.tar.gz": b"x", "d/.hidden.tar": b"x", "f.tar": b"xy"}
    root = "s3://bucket"
    assert found(f"{root}/d/t-{{03..05}}.tar", f"{root}/f.tar") == ["t-03.tar", "t-04.tar", "t-05.tar", "f.tar"]
    assert found(f"{root}/d/t-0[2-4].tar") == ["t-02.tar", "t-03.tar", "t-04.tar"]
    assert found(f"{root}/*/t-?1.tar") == ["t-01.tar", "t-11.tar"]
    assert found(f"{root}/**/*.tar.gz") == ["e.tar.gz"]
    assert found(f"{root}/d/**/*") == ["e.tar.gz", *(f"t-{i:02d}.tar" for i in range(12))]
    assert found(f"{root}/d/") == ["e.tar.gz", *(f"t-{i:02d}.tar" for i in range(12))]
    assert len(found(root)) == 14
    shards, (hint,) = expand([f"{root}/d/t-07.tar"])
    assert (shards[0].name, shards[0].size) == ("t-07", 7)
    assert hint.endswith("'s3://bucket/d/t-{00..11}.tar'")


def test_many_remote_shards_take_one_listing(store: S3) -> None:
    store.objects |= {f"d/{i:03d}.tar": bytes(i) for i in range(100)}
    shards, _ = expand(["s3://bucket/d/{000..099}.tar"])
    assert [shard.size for shard in shards] == list(range(100))
    assert [request for request in store.requests if "d/" in request] == ["LIST d/"]


def test_missing_in_an_object_store(store: S3) -> None:
    store.objects |= {f"d/{i}.tar": b"x" for i in range(5)}
    assert "s3://bucket/d/9.tar: no such file" in refused("s3://bucket/d/9.tar")
    assert "lacks 2 of its 7 shards" in refused("s3://bucket/d/{0..6}.tar")
    assert "matches no file" in refused("s3://bucket/e*/*.tar")
    assert "s3://other/d/*.tar" in refused("s3://other/d/*.tar")


def test_reading_from_an_object_store(store: S3) -> None:
    store.objects["x.tar"] = tar_bytes(samples(3, bytes(99_999)))
    (shard,), _ = expand(["s3://bucket/x.tar"])
    assert [sample.label for sample in read_samples(shard)] == [0, 1, 2]
    assert list_keys(shard) == ["s0", "s1", "s2"]
    store.objects["x.tar"] = store.objects["x.tar"][:-10_240]
    with pytest.raises(OSError, match="changed since it was listed"):
        list(read_samples(shard))
    del store.objects["x.tar"]
    with pytest.raises(FileNotFoundError):
        list(read_samples(shard))


def test_a_connection_that_breaks_is_the_worlds_fault(store: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "REQUESTS", 2)  # Arrow waits longer before each attempt
    store.objects["x.tar"] = tar_bytes(samples(3, bytes(99_999)))
    (shard,), _ = expand(["s3://bucket/x.tar"])
    store.cut = True
    with pytest.raises(OSError, match="NETWORK"):
        list(read_samples(shard))
