"""A run's folder, on a local disk or in an object store: whole files appear under their names, or not at all."""

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

SCRATCH = "_tmp-"  # Arrow's and Spark's readers skip names that begin so
_UNLOCKED_GRACE_S = 60.0  # between the making of a scratch folder and the locking of it


class Store:
    """One run folder. Names are relative to it, with forward slashes."""

    def __init__(self, root: str):
        self.fs, self.path = filesystem(root)
        self.local = isinstance(self.fs, fs.LocalFileSystem)

    def full(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """The file's bytes; None where there is no such file."""
        try:
            if self.local:
                return Path(self.full(name)).read_bytes()
            with self.fs.open_input_stream(self.full(name)) as stream:
                content: bytes = stream.read()
                return content
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_all(self, folder: str) -> Iterator[tuple[str, bytes]]:
        """Name (relative to `folder`) and bytes of each .json file below it, from one listing."""
        names = self.listing(folder, ".json")
        if self.local:
            contents = ((name, self.read(f"{folder}/{name}")) for name in names)
            yield from ((name, raw) for name, raw in contents if raw is not None)
            return
        with ThreadPoolExecutor(32) as threads:
            read = threads.map(self.read, [f"{folder}/{name}" for name in names])
            yield from ((name, raw) for name, raw in zip(names, read, strict=True) if raw is not None)

    def listing(self, folder: str, suffix: str) -> list[str]:
        """Names below `folder`, relative to it, sorted, that end in `suffix`."""
        base = self.full(folder)
        if self.local:
            return sorted(_walk(base, "", suffix))
        found = self.fs.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        return sorted(i.path[len(base) + 1 :] for i in found if i.type == fs.FileType.File and i.path.endswith(suffix))

    def publish(self, made: Path, name: str) -> None:
        """Make a finished scratch file visible under its name, whole, in place of what is there."""
        target = self.full(name)
        if not self.local:
            content = made.read_bytes()
            with self.fs.open_output_stream(target) as stream:
                stream.write(content)
            arrived = self.fs.get_file_info(target).size
            if arrived != len(content):
                raise ConnectionError(f"{target} arrived with {arrived} of its {len(content)} bytes")
            made.unlink()
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        publish(made, Path(target))

    def create(self, made: Path, name: str) -> bool:
        """Like `publish`, but only where nothing stands under the name: False means that another was first."""
        target = self.full(name)
        if not self.local:
            if self.fs.get_file_info(target).type != fs.FileType.NotFound:
                return False
            self.publish(made, name)
            return True
        fsync(made)
        try:
            os.link(made, target)
        except FileExistsError:
            return False
        finally:
            made.unlink()
        fsync(Path(target).parent)
        return True

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all below it; nothing happens where there is none."""
        target = self.full(name)
        kind = self.fs.get_file_info(target).type
        if kind == fs.FileType.Directory:
            self.fs.delete_dir(target)
        elif kind == fs.FileType.File:
            self.fs.delete_file(target)


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


@contextlib.contextmanager
def session(store: Store) -> Iterator[Path]:
    """The scratch folder of one driver and its workers, gone at the end; those of dead drivers are swept.

    On a local disk it lies in the run's folder (a rename must not cross file systems) and is locked by the driver for
    as long as it lives: a kill -9 frees the lock too, which is how the next driver knows whose temporaries are stale.
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


def _sweep(root: Path) -> None:
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
