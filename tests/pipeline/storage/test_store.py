"""Files appear completely or not at all, and the scratch folders of dead drivers are removed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saltern.pipeline.storage import store as module
from saltern.pipeline.storage.store import SCRATCH, Store, session


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def scratch_folders(store: Store) -> list[str]:
    return [path.name for path in Path(store.path).glob(f"{SCRATCH}*")]


def test_publish_replaces_and_leaves_no_temporary(store: Store) -> None:
    with session(store) as scratch:
        for content in (b"one", b"two"):
            made = scratch / "x"
            made.write_bytes(content)
            store.publish(made, "data/a/b.parquet")
            assert not made.exists()
    assert store.read("data/a/b.parquet") == b"two"
    assert store.listing("", "") == ["data/a/b.parquet"]


def test_write_replaces_and_leaves_no_temporary(store: Store) -> None:
    for content in (b"one", b"two"):
        store.write("receipts/a.json", content)
    assert store.read("receipts/a.json") == b"two"
    assert store.listing("", "") == ["receipts/a.json"]


def test_remove_takes_the_named_files_and_the_folders_that_become_empty(store: Store) -> None:
    for name in ("a.json", "b.json", "deep/er/c.json"):
        store.write(f"receipts/{name}", b"{}")
    store.remove(["receipts/a.json", "receipts/none.json", "receipts/deep/er/c.json"])
    assert store.listing("", "") == ["receipts/b.json"]
    assert [path.name for path in Path(store.full("receipts")).iterdir()] == ["b.json"]
    with pytest.raises(OSError, match="receipts"):
        store.remove(["receipts"])


def test_listing_is_recursive_and_by_ending(store: Store) -> None:
    for name in ("receipts/a.json", "receipts/b/c.json", "receipts/b/c.txt"):
        path = Path(store.full(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    assert store.listing("receipts", ".json") == ["a.json", "b/c.json"]
    assert dict(store.read_all("receipts")) == {"a.json": b"{}", "b/c.json": b"{}"}
    assert store.listing("nowhere", "") == []
    assert store.read("nowhere.json") is None


def test_a_living_drivers_scratch_stays_a_dead_ones_goes(store: Store) -> None:
    code = (
        "import sys, time\n"
        "from saltern.pipeline.storage.store import Store, session\n"
        "with session(Store(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half.parquet').write_bytes(b'x')\n"
        "    print(scratch.name, flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, store.path], stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        with session(store):
            assert name in scratch_folders(store)
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert name in scratch_folders(store)
    assert scratch_folders(store) == []  # removed at the end, as at the next start


def test_a_scratch_folder_that_is_being_made_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    young = Path(store.path) / f"{SCRATCH}young"
    young.mkdir(parents=True)
    with session(store):
        pass
    assert young.exists()
    old = time.time() - module._UNLOCKED_GRACE_S - 1
    os.utime(young, (old, old))
    with session(store):
        pass
    assert not young.exists()
