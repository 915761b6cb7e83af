"""A run's folder, on a local disk or in an object store. Its files are visible only when they are complete."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs

from saltern.pipeline.storage.files import fsync, publish
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
            content = finished.read_bytes()
            with self.fs.open_output_stream(target) as stream:
                stream.write(content)
            arrived = self.fs.get_file_info(target).size
            if arrived != len(content):
                raise ConnectionError(f"{target} arrived with {arrived} of its {len(content)} bytes")
            finished.unlink()
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        publish(finished, Path(target))

    def create(self, finished: Path, name: str) -> bool:
        """Move a finished scratch file to `name` unless a file exists there. Return whether it was moved."""
        target = self.full(name)
        if not self.local:
            if self.fs.get_file_info(target).type != fs.FileType.NotFound:
                return False
            self.publish(finished, name)
            return True
        fsync(finished)
        try:
            os.link(finished, target)
        except FileExistsError:
            return False
        finally:
            finished.unlink()
        fsync(Path(target).parent)
        return True

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything below it. A missing one is not an error."""
        target = self.full(name)
        kind = self.fs.get_file_info(target).type
        if kind == fs.FileType.Directory:
            self.fs.delete_dir(target)
        elif kind == fs.FileType.File:
            self.fs.delete_file(target)


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
    """Remove the scratch folders that no living driver owns."""
    for scratch in root.glob(f"{SCRATCH}*"):
        if not _owned(scratch):
            shutil.rmtree(scratch, ignore_errors=True)


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
