"""The folder of an export: refused if it holds anything else, and each file appears in it only when it is whole."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pyarrow import fs

from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.storage.lock import CLAIM, LOCK
from saltern.pipeline.storage.session import own_folder, session
from saltern.pipeline.storage.store import SCRATCH, Store
from saltern.schemas.errors import UserError, printable
from saltern.schemas.seal import seal, unseal

MARK = "export.json"  # names the format and the run of the files in the folder


class Folder:
    """An open export folder, local or in an object store."""

    def __init__(self, store: Store, scratch: str):
        self._store, self._scratch = store, scratch
        # An object appears when its upload ends, however it ends, so a file is finished on this machine first.
        self._local = Path(store.full(scratch)) if store.local else own_folder()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        """Open a new file, which gets its name, replacing any file of it, if the block ends without an error."""
        path = self._local / uuid.uuid4().hex
        try:
            with open(path, "w+b") as stream:
                yield stream
            self._store.place(path, self._scratch, name)
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def spool(self) -> Iterator[IO[bytes]]:
        """Open a file that is removed when the block ends."""
        with tempfile.TemporaryFile(dir=self._local) as stream:
            yield stream

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, of which there may be millions: a local one is not flushed to the disk at once."""
        if not self._store.local:
            self._store.write(name, content)
            return
        path, target = self._local / uuid.uuid4().hex, Path(self._store.full(name))
        try:
            path.write_bytes(content)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(out: str, run: SaliencyRun, form: str) -> Iterator[Folder]:
    """Own the folder of an export, which is new, empty, or holds an export of the same run in the same format.

    Raises:
        UserError: it holds something else, another command writes there, or the run or its shards lie in it.
    """
    store = Store(out)
    _check_apart(store, run)
    mark = {"format": form, "fingerprint": run.run.fingerprint}
    _check_content(store, mark)
    with session(store) as owned:
        _check_content(store, mark)
        store.write(MARK, seal(mark))
        yield Folder(store, owned.scratch)


def _check_apart(store: Store, run: SaliencyRun) -> None:
    out = _real(store, store.path)
    home = _real(run.store, run.store.path)
    if f"{out}/".startswith(f"{home}/"):
        raise UserError(f"--out {store.path} lies in the run {run.path}; give another folder")
    for shard in run.run.shards:
        place = os.path.realpath(shard.url) if "://" not in shard.url else shard.url.partition("://")[2]
        if place.startswith(f"{out}/"):
            raise UserError(f"{shard.url}: this input lies in --out {store.path}; give another folder")
        if any(part in ("", ".", "..") for part in shard.name.split("/")):
            raise UserError(f"{run.path}: run.json names a shard {printable(shard.name)!r}, which is no name of a file")


def _real(store: Store, path: str) -> str:
    return os.path.realpath(path) if store.local else path.rstrip("/")


def _check_content(store: Store, mark: dict[str, str]) -> None:
    infos = store.fs.get_file_info(fs.FileSelector(store.path, allow_not_found=True))
    names = sorted(info.base_name for info in infos)
    if not [name for name in names if name != LOCK and not name.startswith((SCRATCH, CLAIM))]:
        return
    raw = store.read(MARK)
    if raw is None:
        raise UserError(f"--out {store.path} holds files that no export wrote ({names[0]}); give a new or an empty one")
    try:
        found = unseal(raw, sealed=True)
    except ValueError as error:
        raise UserError(f"{store.full(MARK)} is damaged ({error}); give another --out") from error
    if found != mark:
        raise UserError(
            f"--out {store.path} holds an export as {found.get('format')} of the run {found.get('fingerprint')}, not "
            f"as {mark['format']} of {mark['fingerprint']}; remove it, or give another --out"
        )
