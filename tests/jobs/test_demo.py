"""The demo replaces its own files, and no others in the folder."""

from pathlib import Path

import pytest
from making import write_shards

from saltern.jobs import demo as module
from saltern.pipeline.shards.pack import pack
from saltern.schemas.errors import UserError


class Packed(Exception):  # noqa: N818
    """Ends the demo after its first command."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack in this process, and end the demo then. Its photographs are this test's, as packages may be absent."""

    def run(command: str, folder: Path, *options: str | Path) -> None:
        pack(folder, Path(options[1]), per_shard=4, shuffle=None)
        raise Packed

    monkeypatch.setattr(module, "_saltern", run)
    monkeypatch.setattr(module, "PHOTOGRAPHS", {"pytest/.": ["__init__.py"]})
    (found,) = module._originals().values()
    monkeypatch.setattr(module, "_originals", lambda: dict.fromkeys(["a.png", "b.png"], found))


def demo(out: Path) -> None:
    with pytest.raises(Packed):
        module.demo(out)


@pytest.mark.usefixtures("started")
def test_a_second_demo_replaces_the_first(tmp_path: Path) -> None:
    demo(tmp_path)
    first = (tmp_path / "shards/shard-000000.tar").read_bytes()
    demo(tmp_path)
    assert (tmp_path / "shards/shard-000000.tar").read_bytes() == first


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("name", ["shards/list.txt", "photographs/mine.png", "photographs/b.png"])
def test_files_of_the_user_stay(tmp_path: Path, name: str) -> None:
    demo(tmp_path)
    (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{name} is no file of an earlier demo"):
        module.demo(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("started")
def test_shards_of_the_user_stay(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 1, 2)
    with pytest.raises(UserError, match=r"part-000000\.tar is no file of an earlier demo"):
        module.demo(tmp_path)
    assert (tmp_path / "shards/part-000000.tar").exists()
    assert not (tmp_path / "photographs").exists()
