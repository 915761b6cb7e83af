"""SHARDS that are no usable tars end at once with a line that names the file and a fix that works."""

import os
import re
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest
from reading import fails, read
from tars import samples, shard_at, tar_bytes

from saltern.pipeline.shards import expand as module
from saltern.pipeline.shards.expand import expand
from saltern.schemas.errors import UserError


def refused(*patterns: str | Path) -> str:
    with pytest.raises(UserError) as error:
        expand(list(map(str, patterns)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "pattern", ["x-{0..30000000}.tar", "x-{0..999999999999999}.tar", "{0..999}-{0..999}-{0..9}.tar"]
)
def test_braces_of_too_many_shards(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARDS", 10_000)
    start = time.process_time()
    tracemalloc.start()
    try:
        assert "more than 10,000 shards" in refused(tmp_path / pattern)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5


def test_braces_with_steps_and_choices_are_not_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARDS", 20)
    for pattern in ("{0..1000..100}.tar", "{a{0..9},b{0..9}}.tar", "{09..00}.tar"):
        assert " lacks " in refused(tmp_path / pattern)


@pytest.mark.parametrize("pattern", ["", "x.tar", "*.tar", "**/*.tar"])
def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path, pattern: str) -> None:
    os.mkfifo(tmp_path / "x.tar")
    assert "x.tar: not a regular file" in refused(tmp_path / pattern)


def linked(tmp_path: Path) -> Path:
    """Return a folder of one shard, a sub-folder of another, and links to the folder from both."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.tar", "sub/b.tar"):
        (folder / name).write_bytes(tar_bytes(samples(1)))
    for name in ("loop", "again", "sub/up"):
        (folder / name).symlink_to(folder)
    return folder


@pytest.mark.parametrize("pattern", ["", "**/*.tar", "**", "**/**/*.tar"])
def test_a_folder_with_links_to_itself_ends(tmp_path: Path, pattern: str) -> None:
    folder = linked(tmp_path)
    shards, hints = expand([str(folder / pattern)])
    assert [shard.url.removeprefix(f"{folder}/") for shard in shards] == ["a.tar", "sub/b.tar"]
    assert sorted(hint.removeprefix(f"{folder}/").split()[0] for hint in hints) == ["again", "loop", "sub/up"]


@pytest.mark.parametrize(("target", "why"), [("gone.tar", "a link to nowhere"), ("b.tar", "a link in a loop")])
@pytest.mark.parametrize("pattern", ["", "*.tar", "**/*.tar", "b.tar"])
def test_a_link_that_leads_to_no_tar_is_refused_with_the_fix(
    tmp_path: Path, pattern: str, target: str, why: str
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples(1)))
    (tmp_path / "b.tar").symlink_to(target)
    assert refused(tmp_path / pattern).startswith(f"{tmp_path}/b.tar: {why}; remove it, or restore the file")
    (tmp_path / "b.tar").unlink()
    assert len(expand([str(tmp_path)])[0]) == 1


def test_links_to_nowhere_and_to_folders_above_are_said(tmp_path: Path) -> None:
    """A link may have been one to a folder of shards, or lead to every folder of the disk."""
    folder = tmp_path / "deep/in"
    folder.mkdir(parents=True)
    (folder / "a.tar").write_bytes(tar_bytes(samples(1)))
    (tmp_path / "other.tar").write_bytes(tar_bytes(samples(1)))
    for name, target in (("gone", "nowhere"), ("loop", "loop"), ("up", "../..")):
        (folder / name).symlink_to(target)
    shards, hints = expand([str(folder)])
    assert [shard.name for shard in shards] == ["a"]
    assert [hint.removeprefix(f"{folder}/")[:22] for hint in sorted(hints)] == [
        "gone is a link to nowh",
        "loop is a link to nowh",
        "up is a link to a fold",
    ]


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    linked(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/there").symlink_to(tmp_path / "in/sub")
    (tmp_path / "in/sub/up").unlink()
    for pattern in ("", "**/*.tar", "**/there"):
        shards, hints = expand([str(tmp_path / "other" / pattern)])
        assert [shard.name for shard in shards] == ["b"]
        assert hints == []


def test_an_unreadable_name_is_named(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/x\xff.tar"
    Path(os.fsdecode(path)).write_bytes(tar_bytes(samples(1)))
    assert r"x\udcff.tar'" in refused(tmp_path)


@pytest.mark.parametrize(
    ("ending", "pack", "unpack"),
    [
        ("bz2", "bzip2", "bzip2 -d"),
        ("xz", "xz", "xz -d"),
        ("zst", "zstd --rm -q", "zstd -d --rm -q"),
    ],
)
def test_compressed_tars_are_named_with_a_command_that_works(
    tmp_path: Path, ending: str, pack: str, unpack: str
) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar_bytes(samples(2)))
    compressed = tmp_path / f"a.tar.{ending}"
    subprocess.run([*pack.split(), "a.tar"], cwd=tmp_path, check=True)
    assert compressed.exists()
    shards, (hint,) = expand([str(tmp_path)])
    assert len(shards) == 1
    assert f"1 compressed tars are not read, as {compressed}" in hint
    (tmp_path / "b.tar").unlink()
    command = re.search(r"`(.*?)`", hint)
    assert command
    assert f"`{command[1]}`" in refused(tmp_path)
    assert command[1] in unpack
    reason = fails(shard_at(compressed), f"decompress it with `{unpack[: unpack.index('-d') + 2]}`")
    assert "pack" not in reason
    subprocess.run([*unpack.split(), compressed], check=True)
    assert len(read(shard_at(tmp_path / "a.tar"))) == 2
