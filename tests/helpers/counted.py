"""A remote store for tests: a local folder behind a filesystem that counts and delays what is opened for reading."""

import time
from collections import Counter
from typing import Any

import pytest
from pyarrow import fs

from saltern.pipeline.storage import lock, store


class Counted(fs.FileSystemHandler):
    """Opens local files by their paths.

    Args:
        latency_s: of each opening for reading.
    """

    def __init__(self, latency_s: float = 0.0):
        self.opened: Counter[str] = Counter()  # by path
        self._files, self._latency_s = fs.LocalFileSystem(), latency_s

    def open_input_file(self, path: str) -> Any:
        return self._files.open_input_file(self._count(path))

    def open_input_stream(self, path: str) -> Any:
        return self._files.open_input_stream(self._count(path))

    def _count(self, path: str) -> str:
        self.opened[path] += 1
        time.sleep(self._latency_s)
        return path

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._files.create_dir(path.rpartition("/")[0])  # an object store has no folders
        return self._files.open_output_stream(path)

    def copy_file(self, src: str, dest: str) -> None:
        self._files.create_dir(dest.rpartition("/")[0])
        self._files.copy_file(src, dest)

    def get_type_name(self) -> str:
        return "counted"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._files.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._files.get_file_info(selector)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def create_dir(self, path: str, recursive: bool) -> None:
        self._files.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._files.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._files.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._files.move(src, dest)


def use_counted(monkeypatch: pytest.MonkeyPatch, latency_s: float = 0.0) -> Counted:
    """Serve the folders of runs by a remote store until the test ends."""
    handler = Counted(latency_s)
    remote = fs.PyFileSystem(handler)
    monkeypatch.setattr(store, "filesystem", lambda root: (remote, root))
    monkeypatch.setattr(lock, "SETTLE_S", 0.01)
    return handler
