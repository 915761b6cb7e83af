"""One driver a run: a lock on a file in the run's folder, or a claim in it where files cannot be locked.

A claim is an object that its owner writes again every minute. Who writes a claim and then lists no other owns the run:
of two that start together, at least one sees the other. Object stores list an object as soon as it is written.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from saltern.pipeline.machine import process_identity
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import OutputError, UserError, printable

LOCK = ".lock"
CLAIM = "_claim-"  # Arrow's and Spark's readers skip names with this prefix
BEAT_S = 60.0
STALE_S = 300.0  # age of a claim, relative to a new one, whose owner is taken for dead
SETTLE_S = 5.0  # for which the first of several new claims waits until the others are withdrawn
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Lock(Protocol):
    """The ownership of a run's folder."""

    def check(self) -> None:
        """Check that the run is still owned. Raises OutputError if it was taken over."""


@contextlib.contextmanager
def own(store: Store) -> Iterator[Lock]:
    """Own a run's folder, as one driver at a time can.

    Raises:
        UserError: another driver owns it; the message names its host and process.
    """
    handle = _lock(store) if store.local else None
    if handle is None:
        with _claimed(store) as claim:
            yield claim
        return
    path = Path(store.full(LOCK))
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_me()).encode(), 0)
        yield _FileLock(path, handle)
    finally:
        if _same(path, handle):
            path.unlink()
        os.close(handle)


def _lock(store: Store) -> int | None:
    """Return a locked handle of the lock file; None if this file system cannot lock."""
    path = Path(store.full(LOCK))
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 4096, 0)
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise _refusal(store, owner) from None
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        if _same(path, handle):
            return handle
        os.close(handle)  # its owner removed the file meanwhile


def _same(path: Path, handle: int) -> bool:
    """Return whether the path still names the open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


class _FileLock:
    def __init__(self, path: Path, handle: int):
        self._path, self._handle = path, handle

    def check(self) -> None:
        if not _same(self._path, self._handle):
            raise OutputError(f"{self._path} was removed: another command may have taken over the run")


@contextlib.contextmanager
def _claimed(store: Store) -> Iterator["_Claim"]:
    claim = _Claim(store)
    claim.write()
    try:
        claim.settle()
        with claim.beating():
            yield claim
    finally:
        store.remove([claim.name])


class _Claim:
    """A claim on a run's folder.

    A process that was paused for minutes may have lost its claim to another, so the owner looks for it before it
    publishes.
    """

    def __init__(self, store: Store):
        self._store = store
        self.name = f"{CLAIM}{uuid.uuid4().hex}"
        self._content = json.dumps(_me()).encode()

    def write(self) -> None:
        self._store.write(self.name, self._content)

    def check(self) -> None:
        if self._store.fs.get_file_info(self._store.full(self.name)).type != fs.FileType.File:
            raise OutputError(f"{self._store.full(self.name)} was removed: another command has taken over the run")

    def settle(self) -> None:
        """Wait until there is no other claim. Raises UserError if there is an older one, or a first of several new."""
        end = time.monotonic() + SETTLE_S
        while others := self._others():
            name, owner = min(others.items())
            if name < self.name or time.monotonic() > end:
                raise _refusal(self._store, owner)
            time.sleep(SETTLE_S / 10)

    def _others(self) -> dict[str, bytes]:
        """Return the claims of other live owners, by name. Remove those of dead ones."""
        infos = self._store.fs.get_file_info(fs.FileSelector(self._store.path))
        claims = {info.base_name: info for info in infos if info.base_name.startswith(CLAIM)}
        if self.name not in claims:
            raise ConnectionError(f"{self._store.full(self.name)} was written, and is not listed")
        newest = claims.pop(self.name).mtime_ns
        others = {}
        for name, info in claims.items():
            owner = self._store.read(name)
            if owner is None:
                continue
            if newest - info.mtime_ns > STALE_S * 1e9 or _dead(owner):
                self._store.remove([name])
            else:
                others[name] = owner
        return others

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Write the claim again and again, until it is lost."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), name="saltern-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            try:
                self.check()
                self.write()
            except OutputError:
                return
            except OSError:
                continue  # the network; the next beat may be in time


def _refusal(store: Store, owner: bytes) -> UserError:
    it = _parse(owner)
    who = "its process is not known"
    if it:
        who = printable(f"host {it['host']}, process {it['pid']}, since {it['since']}")
    return UserError(
        f"{store.path}: another command is writing this run ({who}): wait until it ends, stop it, or use another folder"
    )


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "process": process_identity(os.getpid()),
    }


def _parse(owner: bytes) -> dict[str, Any] | None:
    try:
        it = json.loads(owner)
        return {"host": str(it["host"]), "pid": int(it["pid"]), "since": str(it["since"]), "process": it["process"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _dead(owner: bytes) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    it, me = _parse(owner), process_identity(os.getpid())
    if it is None or me is None or not isinstance(it["process"], list):
        return False
    return bool(it["process"][:2] == me[:2] and it["process"] != process_identity(it["pid"]))
