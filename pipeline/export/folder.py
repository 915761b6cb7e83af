"""The folder of an export: refused if it holds anything else, and each file appears in it only when it is whole."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pyarrow import fs

from saltern.pipeline.runs.outlet import accepted
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.storage.lock import CLAIM, LOCK
from saltern.pipeline.storage.session import own_folder
from saltern.pipeline.storage.store import SCRATCH, Store
from saltern.schemas.errors import UserError, printable
from saltern.schemas.export import RECORDS
from saltern.schemas.seal import seal, unseal

MARK = "export.json"  # names the format and the run of the files in the folder


@dataclass(frozen=True)
class Folder:
    """The folder of an export, local or in an object store, for writing. A full one raises OutputError."""

    store: Store
    scratch: str  # folder of unfinished files, a name in the store
    local: Path  # folder of unfinished files on this machine
    files: dict[str, int] = field(default_factory=dict)  # bytes of each file that was written, by name

    @classmethod
    def at(cls, out: str, scratch: str) -> "Folder":
        """Return the folder `out`, with a session's scratch folder of its records."""
        store, scratch = Store(out), f"{RECORDS}/{scratch}"
        # An object appears when its upload ends, however it ends, so a file is finished on this machine first.
        return cls(store, scratch, Path(store.full(scratch)) if store.local else own_folder())

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        """Open a new file, which gets its name, replacing any file of it, if the block ends without an error."""
        path = self.local / uuid.uuid4().hex
        try:
            with accepted(self.store):
                with open(path, "w+b") as stream:
                    yield stream
                self.files[name] = path.stat().st_size
                self.store.place(path, self.scratch, name)
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def spool(self) -> Iterator[IO[bytes]]:
        """Open a file that is removed when the block ends."""
        with tempfile.TemporaryFile(dir=self.local) as stream:
            yield stream

    def mark(self, run: SaliencyRun, form: str) -> None:
        """Write MARK, without which files in a folder are of others."""
        self.write(MARK, seal(_mark(run, form)))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, of which there may be millions: a local one is not flushed to the disk at once."""
        self.files[name] = len(content)
        with accepted(self.store):
            if not self.store.local:
                self.store.write(name, content)
                return
            path, target = self.local / uuid.uuid4().hex, Path(self.store.full(name))
            try:
                path.write_bytes(content)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            finally:
                path.unlink(missing_ok=True)


def records(out: str) -> Store:
    """Return the folder of an export's receipts and records."""
    return Store(f"{out.rstrip('/')}/{RECORDS}")


def check(out: str, run: SaliencyRun, form: str) -> None:
    """Check that a folder is new, empty, or holds an export of the same run in the same format.

    Raises:
        UserError: it holds something else, or the run or its shards lie in it.
    """
    store = Store(out)
    _check_apart(store, run)
    _check_content(store, _mark(run, form))


def _mark(run: SaliencyRun, form: str) -> dict[str, str]:
    return {"format": form, "fingerprint": run.run.fingerprint}


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
    names = sorted(info.base_name for info in infos if info.base_name not in (LOCK, RECORDS))
    others = [name for name in names if not name.startswith((SCRATCH, CLAIM))]
    raw = store.read(MARK)
    if raw is None:
        if others:
            raise UserError(
                f"--out {store.path} holds files that no export wrote ({others[0]}); give a new or an empty one"
            )
        return
    try:
        found = unseal(raw, sealed=True)
    except ValueError as error:
        raise UserError(f"{store.full(MARK)} is damaged ({error}); give another --out") from error
    if found != mark:
        raise UserError(
            f"--out {store.path} holds an export as {found.get('format')} of the run {found.get('fingerprint')}, not "
            f"as {mark['format']} of {mark['fingerprint']}; remove it, or give another --out"
        )
