"""Files appear completely or not at all."""

from pathlib import Path

import pytest

from saltern.pipeline.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_move_replaces_and_leaves_no_temporary(store: Store) -> None:
    for content in (b"one", b"two"):
        store.write("_tmp-a/x", content)
        store.move("_tmp-a/x", "data/a/b.parquet")
    assert store.read("data/a/b.parquet") == b"two"
    assert store.listing("", "") == ["data/a/b.parquet"]
    assert store.sizes("data") == {"a/b.parquet": 3}


def test_write_replaces_and_leaves_no_temporary(store: Store) -> None:
    for content in (b"one", b"two"):
        store.write("receipts/a.json", content)
    assert store.read("receipts/a.json") == b"two"
    assert store.listing("", "") == ["receipts/a.json"]


def test_remove_takes_the_named_files_and_prune_the_empty_folders(store: Store) -> None:
    for name in ("a.json", "b.json", "deep/er/c.json"):
        store.write(f"receipts/{name}", b"{}")
    store.remove(["receipts/a.json", "receipts/none.json", "receipts/deep/er/c.json"])
    store.prune("receipts")
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
