"""Folders for unfinished files, which no crash leaves for ever."""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from saltern.pipeline.storage.lock import Lock, own
from saltern.pipeline.storage.store import SCRATCH, Store

_GRACE_S = 60.0  # from making a file or a folder to publishing or locking it


@dataclass(frozen=True)
class Session:
    """A driver's hold of a run's folder."""

    lock: Lock
    scratch: str  # folder of unfinished files, a name in the run's folder: a rename must not cross file systems


@contextlib.contextmanager
def session(store: Store) -> Iterator[Session]:
    """Own the run's folder, with a scratch folder in it. Scratch of drivers and workers that were killed is removed.

    Raises:
        UserError: another driver owns the folder.
    """
    new = store.local and not os.path.exists(store.path)
    if store.local:
        os.makedirs(store.path, exist_ok=True)
    try:
        with own(store) as lock:
            _sweep(store)
            scratch = f"{SCRATCH}{uuid.uuid4().hex[:12]}"
            if store.local:
                os.mkdir(store.full(scratch))
                store.scratch = scratch
            try:
                yield Session(lock, scratch)
            finally:
                store.scratch = ""
                _remove(store, scratch)
    finally:
        if new:
            with contextlib.suppress(OSError):  # a refused call leaves nothing, another a run
                os.rmdir(store.path)


def _sweep(store: Store) -> None:
    """Remove scratch folders, and unfinished files that are not of this moment. Only the owner of a run has scratch."""
    infos = store.fs.get_file_info(fs.FileSelector(store.path, allow_not_found=True))
    for info in infos:
        if info.base_name.startswith(SCRATCH):
            if info.type == fs.FileType.Directory:
                _remove(store, info.base_name)
            elif time.time() - info.mtime.timestamp() > _GRACE_S:
                store.remove([info.base_name])


def _remove(store: Store, scratch: str) -> None:
    if store.local:
        shutil.rmtree(store.full(scratch), ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            store.fs.delete_dir(store.full(scratch))


def own_folder() -> Path:
    """Return a folder on this machine's disk that goes with this process. Those of killed processes are removed.

    A process holds a lock on a file in its folder. Even a kill -9 frees the lock.
    """
    mine = f"saltern-{os.getuid()}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{mine}*"):
        if not _owned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=mine))
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)  # until the process ends
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _owned(folder: Path) -> bool:
    try:
        with open(folder / "lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - folder.stat().st_mtime < _GRACE_S
        return True
    except OSError:
        return True
