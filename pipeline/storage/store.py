"""A run's folder, on a local disk or in an object store. Its files are visible only when they are complete."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs

from saltern.pipeline.storage.files import publish
from saltern.pipeline.storage.filesystem import filesystem

SCRATCH = "_tmp-"  # Arrow's and Spark's readers skip names with this prefix
_UNLOCKED_GRACE_S = 60.0  # from creating a scratch folder to locking it


class Store:
    """One run folder. File names are relative to it, with forward slashes."""

    def __init__(self, root: str):
        self.fs, self.path = filesystem(root)
        self.local = isinstance(self.fs, fs.LocalFileSystem)

    def full(self, name: str) -> str:
        """Return the path of a name in the filesystem."""
        return f"{self.path.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return the file's bytes; None if it does not exist."""
        try:
            if self.local:
                return Path(self.full(name)).read_bytes()
            with self.fs.open_input_stream(self.full(name)) as stream:
                content: bytes = stream.read()
                return content
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_all(self, folder: str) -> Iterator[tuple[str, bytes]]:
        """Yield the name (relative to `folder`) and the bytes of each .json file below it, from one listing."""
        names = self.listing(folder, ".json")
        if self.local:
            contents = ((name, self.read(f"{folder}/{name}")) for name in names)
            yield from ((name, raw) for name, raw in contents if raw is not None)
            return
        with ThreadPoolExecutor(32) as threads:
            read = threads.map(self.read, [f"{folder}/{name}" for name in names])
            yield from ((name, raw) for name, raw in zip(names, read, strict=True) if raw is not None)

    def listing(self, folder: str, suffix: str) -> list[str]:
        """Return the names below `folder` that end in `suffix`, sorted and relative to it."""
        base = self.full(folder)
        if self.local:
            return sorted(_walk(base, "", suffix))
        infos = self.fs.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        return sorted(i.path[len(base) + 1 :] for i in infos if i.type == fs.FileType.File and i.path.endswith(suffix))

    def publish(self, finished: Path, name: str) -> None:
        """Move a finished scratch file to `name`, replacing any file there."""
        target = self.full(name)
        if not self.local:
            self._put(name, finished.read_bytes())
            finished.unlink()
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        publish(finished, Path(target))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing any file there."""
        if not self.local:
            self._put(name, content)
            return
        os.makedirs(self.path, exist_ok=True)
        unfinished = Path(self.path) / f"{SCRATCH}{uuid.uuid4().hex}"
        try:
            unfinished.write_bytes(content)
            self.publish(unfinished, name)
        finally:
            unfinished.unlink(missing_ok=True)

    def _put(self, name: str, content: bytes) -> None:
        target = self.full(name)
        with self.fs.open_output_stream(target) as stream:
            stream.write(content)
        arrived = self.fs.get_file_info(target).size
        if arrived != len(content):
            raise ConnectionError(f"{target} arrived with {arrived} of its {len(content)} bytes")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, and the folders that become empty. A missing file is not an error."""
        if self.local:
            self._remove_local([Path(name) for name in names])
            return
        with ThreadPoolExecutor(32) as threads:
            list(threads.map(self._delete, names))

    def _remove_local(self, names: list[Path]) -> None:
        root = Path(self.path)
        for name in names:
            (root / name).unlink(missing_ok=True)
        folders = {folder for name in names for folder in name.parents[:-1]}
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):  # it is not empty
                (root / folder).rmdir()

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.full(name))


@contextlib.contextmanager
def session(store: Store) -> Iterator[Path]:
    """Give one driver and its workers a scratch folder, and remove it at the end. Remove those of dead drivers too.

    On a local disk the folder is in the run's folder, as a rename must not cross file systems. The driver holds a lock
    on it. Even a kill -9 frees the lock, so the next driver knows which scratch folders are stale.
    """
    if not store.local:
        with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
            yield Path(folder)
        return
    os.makedirs(store.path, exist_ok=True)
    _sweep(Path(store.path))
    scratch = Path(store.path) / f"{SCRATCH}{uuid.uuid4().hex[:12]}"
    scratch.mkdir()
    with open(scratch / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            _sweep(Path(store.path))


def _walk(base: str, below: str, suffix: str) -> Iterator[str]:
    try:
        entries = list(os.scandir(os.path.join(base, below)))
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(base, name, suffix)
        elif entry.name.endswith(suffix):
            yield name


def _sweep(root: Path) -> None:
    """Remove the scratch folders that no living driver owns, and unfinished files."""
    for scratch in root.glob(f"{SCRATCH}*"):
        if scratch.is_dir() and not _owned(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
        elif scratch.is_file() and time.time() - scratch.stat().st_mtime > _UNLOCKED_GRACE_S:
            scratch.unlink(missing_ok=True)


def _owned(scratch: Path) -> bool:
    try:
        with open(scratch / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - scratch.stat().st_mtime < _UNLOCKED_GRACE_S
        return True
