"""A run's folder, on a local disk or in an object store. Its files are visible only when they are complete."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs

from saltern.pipeline.storage.ahead import read_ahead
from saltern.pipeline.storage.files import fsync
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.errors import UserError

_WRONG = {errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}  # errors about a path
SCRATCH = "_tmp-"  # Arrow's and Spark's readers skip names with this prefix


class Store:
    """One run folder. File names are relative to it, with forward slashes."""

    def __init__(self, root: str):
        self.fs, self.path = filesystem(root)
        self.local = isinstance(self.fs, fs.LocalFileSystem)
        self.scratch = ""  # folder of unfinished files; a driver has one that goes with it, others use the root

    def full(self, name: str) -> str:
        """Return the path of a name in the filesystem."""
        return f"{self.path.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return the file's bytes; None if it does not exist."""
        path = self.full(name)
        try:
            if self.local:
                with named(path), open(path, "rb") as file:
                    return file.read()
            with self.fs.open_input_stream(path) as stream:
                content: bytes = stream.read()
                return content
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise _no_folder(path) from error
        except OSError:
            # An object that is removed after it was opened has another error.
            if self.local or self.fs.get_file_info(path).type != fs.FileType.NotFound:
                raise
            return None

    def read_all(self, folder: str) -> Iterator[tuple[str, bytes]]:
        """Yield the name (relative to `folder`) and the bytes of each .json file below it, from one listing."""
        names = self.listing(folder, ".json")
        if self.local:
            contents = ((name, self.read(f"{folder}/{name}")) for name in names)
            yield from ((name, raw) for name, raw in contents if raw is not None)
            return
        with contextlib.closing(read_ahead(self.read, (f"{folder}/{name}" for name in names))) as read:
            yield from ((name, raw) for name, raw in zip(names, read, strict=True) if raw is not None)

    def listing(self, folder: str, suffix: str) -> list[str]:
        """Return the names below `folder` that end in `suffix`, sorted and relative to it."""
        base = self.full(folder).rstrip("/")
        if self.local:
            return sorted(_walk(base, "", suffix))
        infos = self.fs.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        return sorted(i.path[len(base) + 1 :] for i in infos if i.type == fs.FileType.File and i.path.endswith(suffix))

    def folders(self) -> list[str]:
        """Return the names of the folders in the run's folder, sorted."""
        infos = self.fs.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of each file below `folder` by its name relative to it, from one listing."""
        base = self.full(folder).rstrip("/")
        if self.local:
            return {name: os.stat(os.path.join(base, name)).st_size for name in _walk(base, "", "")}
        infos = self.fs.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        return {info.path[len(base) + 1 :]: info.size for info in infos if info.type == fs.FileType.File}

    def move(self, name: str, new: str) -> None:
        """Rename a finished file of the run, replacing any file there. On return it is safely stored."""
        source, target = self.full(name), self.full(new)
        if self.local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(source, target)
            fsync(Path(target).parent)
            return
        size = self.fs.get_file_info(source).size
        self.fs.copy_file(source, target)
        self._check(new, size)
        self._delete(name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing any file there. On return it is safely stored."""
        if not self.local:
            with self.fs.open_output_stream(self.full(name)) as stream:
                stream.write(content)
            self._check(name, len(content))
            return
        os.makedirs(self.path, exist_ok=True)
        unfinished = os.path.join(self.scratch, f"{SCRATCH}{uuid.uuid4().hex}")
        path = Path(self.full(unfinished))
        try:
            path.write_bytes(content)
            fsync(path)
            self.move(unfinished, name)
        finally:
            path.unlink(missing_ok=True)

    def place(self, path: Path, scratch: str, name: str) -> None:
        """Store a finished file of this machine, replacing any file of the name; `scratch` is a folder of the store.

        On a local disk the file must be in that folder, and is renamed.
        """
        unfinished = f"{scratch}/{path.name}"
        if self.local:
            fsync(path)
        else:
            with open(path, "rb") as source, self.fs.open_output_stream(self.full(unfinished)) as target:
                shutil.copyfileobj(source, target, 2**23)
            self._check(unfinished, path.stat().st_size)
        self.move(unfinished, name)

    def _check(self, name: str, size: int) -> None:
        arrived = self.fs.get_file_info(self.full(name)).size
        if arrived != size:
            raise ConnectionError(f"{self.full(name)} arrived with {arrived} of its {size} bytes")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files. A missing one is not an error."""
        if self.local:
            for name in names:
                Path(self.full(name)).unlink(missing_ok=True)
            return
        with ThreadPoolExecutor(32) as threads:
            list(threads.map(self._delete, names))

    def prune(self, folder: str) -> None:
        """Remove the empty folders below a local `folder`, and itself. No file may be written there meanwhile."""
        for path, _, _ in os.walk(self.full(folder), topdown=False) if self.local else ():
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(path)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.full(name))


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Raise UserError, which names the path, if it is of a wrong kind or not for this user."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WRONG:
            raise
        raise UserError(f"{path}: {os.strerror(error.errno)}") from error


def _no_folder(path: str) -> UserError:
    """Return the error of a path below a file."""
    place = Path(path)
    file = next((above for above in (place, *place.parents) if above.exists() and not above.is_dir()), place)
    return UserError(f"{file} is a file, where a folder should be; move it away, or give another name")


def _walk(base: str, below: str, suffix: str) -> Iterator[str]:
    folder = os.path.join(base, below)
    try:
        with named(folder):
            entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise _no_folder(folder) from error
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(base, name, suffix)
        elif entry.name.endswith(suffix):
            yield name
