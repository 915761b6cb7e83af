"""What `pack` leaves out of a folder is said, and what it cannot read is refused before anything is packed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from saltern.pipeline.shards.pack import pack
from saltern.schemas.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return touch(tmp_path / "images", "a/1.jpg", "a/2.jpg", "b/1.jpg")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def refused(folder: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        pack(folder, out)
    assert not out.exists() or not list(out.iterdir())
    return str(caught.value)


def test_files_that_cannot_be_read_are_refused_before_packing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to nowhere, whatever their names, links in a loop, pipes, and files of others: all in one line."""
    (folder / "b/9.jpg").symlink_to("nowhere")
    (folder / "b/loop.jpg").symlink_to("loop.jpg")
    (folder / "cats").symlink_to("nowhere")
    os.mkfifo(folder / "a/pipe.png")
    written: list[Any] = []
    monkeypatch.setattr("saltern.pipeline.shards.pack.TarWriter", lambda *args, **options: written.append(args))
    said = refused(folder, tmp_path / "out")
    assert "4 files cannot be read: cats (a link to nowhere), a/pipe.png (not a regular file), b/9.jpg (a link" in said
    assert "and 1 more; nothing was packed: remove broken links" in said
    assert not written


def test_a_file_without_permission_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def forbidden(path: Any, *more: Any, **options: Any) -> int:
        if str(path).endswith("b/1.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", forbidden)
    assert "1 file cannot be read: b/1.jpg (Permission denied); nothing was packed" in refused(folder, tmp_path / "out")


def test_a_file_that_vanishes_while_packing_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def vanish(path: Path) -> bytes:
        (folder / "b/1.jpg").unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    said = refused(folder, tmp_path / "out")
    assert f"{folder}/b/1.jpg: No such file or directory, although it could be read when packing began" in said
    assert "repeat the command" in said


def test_what_is_left_out_is_said(folder: Path, tmp_path: Path) -> None:
    touch(folder, "a/.hid.jpg", "b/__MACOSX/x.jpg", "a/note.txt", "b/list.csv", "b/z.txt", "c/deep/readme")
    (folder / "d").mkdir()
    (folder / "b/up").symlink_to(folder)
    (folder / "b/zero.png").touch()
    packed = pack(folder, tmp_path / "out")
    assert packed.remarks.lines() == [
        "4 files (the first is a/note.txt): skipped, as the name does not end as that of an image",
        "2 hidden names (the first is a/.hid.jpg): skipped",
        "1 link to a folder above (the first is b/up): not followed",
        "2 folders without images (the first is c): no class",
        "1 image of 0 bytes (the first is b/zero.png): packed; extract gives decode_failed",
    ]
    assert (packed.samples, packed.classes) == (4, 2)
    assert json.loads((tmp_path / "out/classes.json").read_text()) == {"0": "a", "1": "b"}


def test_nothing_is_said_of_a_clean_folder(folder: Path, tmp_path: Path) -> None:
    assert pack(folder, tmp_path / "out").remarks.lines() == []


def test_a_link_to_a_folder_above_the_images_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """It would lead to everything there, also to the packed shards."""
    touch(tmp_path / "others", "1.jpg")
    (folder / "a/up").symlink_to("../..")
    packed = pack(folder, tmp_path / "out")
    assert packed.samples == 3
    assert packed.remarks.links.first == "a/up"
