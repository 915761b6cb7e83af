"""A driver's session: its scratch goes with it, and so does what killed drivers and workers left."""

import os
import signal
import time
from pathlib import Path

import pytest

from saltern.pipeline.storage.session import own_folder, session
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import UserError


def test_scratch_of_killed_drivers_and_old_unfinished_files_are_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("_tmp-dead/half.parquet", b"x")
    for name, age in (("_tmp-old", 100), ("_tmp-young", 0)):
        store.write(name, b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with session(store) as held:
        assert sorted(path.name for path in tmp_path.glob("_tmp-*")) == sorted(["_tmp-young", held.scratch])
        with pytest.raises(UserError, match="another command"), session(store):
            pass
        assert (tmp_path / held.scratch).is_dir()  # the refused one swept nothing
    assert [path.name for path in tmp_path.iterdir()] == ["_tmp-young"]


def test_a_new_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), session(Store(str(tmp_path / "new"))):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with session(Store(str(tmp_path / "old"))):
        pass
    assert (tmp_path / "old").exists()


def test_the_folder_of_a_killed_worker_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pid = os.fork()
    if pid == 0:
        (own_folder() / "half.parquet").write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (dead,) = tmp_path.iterdir()
    mine = own_folder()
    assert not dead.exists()
    assert list(tmp_path.iterdir()) == [mine]
    own_folder()
    assert mine.exists()
