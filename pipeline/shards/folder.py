"""List the images of a folder that is to be packed, and everything that is left out."""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from saltern.pipeline.shards.members import split_name, storable
from saltern.pipeline.shards.tape import IMAGES
from saltern.schemas.errors import UserError
from saltern.schemas.text import counted

_SHOWN = 3  # names in a message
_BROKEN = {errno.ENOENT: "a link to nowhere", errno.ELOOP: "a link in a loop"}
_Above = tuple[tuple[int, int], ...]  # identities of the folders on the way


@dataclass(frozen=True, slots=True)
class Image:
    """An image file that is to be packed."""

    name: str  # path in the folder
    key: str
    ext: str
    label: int | None


@dataclass(slots=True)
class Names:
    """A number of files or folders, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        self.count, self.first = self.count + 1, self.first or name


@dataclass(slots=True)
class Remarks:
    """Content of a folder that is left out, or that fails later."""

    others: Names = field(default_factory=Names)  # files whose names are not those of images
    hidden: Names = field(default_factory=Names)  # files and folders
    links: Names = field(default_factory=Names)  # to a folder above
    imageless: Names = field(default_factory=Names)  # class folders
    empty: Names = field(default_factory=Names)  # images of 0 bytes, which are packed

    def lines(self) -> list[str]:
        """Return a line for the user about each kind that there is."""
        kinds = [
            (self.others, "file", "files", "skipped, as the name does not end as that of an image"),
            (self.hidden, "hidden name", "hidden names", "skipped"),
            (self.links, "link to a folder above", "links to folders above", "not followed"),
            (self.imageless, "folder without images", "folders without images", "no class"),
            (
                self.empty,
                "image of 0 bytes",
                "images of 0 bytes",
                "packed; extract gives decode_failed",
            ),
        ]
        return [
            f"{counted(names.count, one, many)} (the first is {names.first}): {how}"
            for names, one, many, how in kinds
            if names.count
        ]


class Folder:
    """The images of a folder, by class folder.

    Args:
        root: one sub-folder per class, or only images. Symbolic links are followed, but not to a folder above.

    Raises:
        UserError: images next to class folders, no image at all, or files that cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.remarks = root, Remarks()
        self._broken: dict[str, str] = {}  # reasons by name
        here = root.resolve()
        above = tuple(map(_identity, here.parents))
        folders, files = self._scan("")
        self.flat = self._images(files)
        if self.flat and folders:
            there = (
                f"{counted(len(self.flat), 'image')} ({self.flat[0]}, ...) next to {counted(len(folders), 'folder')}"
            )
            raise UserError(f"{root}: {there}; move the images into class folders, or pack them separately")
        inside = {name: self._images(sorted(self._walk(name, (*above, _identity(here))))) for name in folders}
        self.classes = {name: images for name, images in inside.items() if images}
        for name in folders:
            if not inside[name]:
                self.remarks.imageless.add(name)
        self._check()
        if not self.flat and not self.classes:
            there = counted(self.remarks.others.count, "file")
            raise UserError(f"{root}: no image in {there}; images end in {', '.join(IMAGES)}")

    def images(self, labels: dict[str, int]) -> Iterator[Image]:
        """Yield all images in order. `labels` gives the number of each class folder."""
        yield from _keyed(self.root, self.flat, None)
        for name, images in self.classes.items():
            yield from _keyed(self.root, images, labels[name])

    def _images(self, files: Iterable[str]) -> list[str]:
        images = []
        for name in files:
            if extension(name):
                images.append(name)
            elif name not in self._broken:
                self.remarks.others.add(name)
        return images

    def _scan(self, below: str) -> tuple[list[str], list[str]]:
        """Return the sorted paths of sub-folders and of files, without hidden ones."""
        folders, files = [], []
        with os.scandir(self.root / below) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.name.startswith((".", "__MACOSX")):
                    self.remarks.hidden.add(name)
                elif _is_folder(entry):
                    folders.append(name)
                else:
                    files.append(name)
                    if entry.is_symlink() and not extension(name):
                        self._try(name)
        return folders, files

    def _walk(self, below: str, above: _Above) -> Iterator[str]:
        """Yield the files below a sub-folder."""
        here = _identity(self.root / below)
        if here in above:
            self.remarks.links.add(below)
            return
        folders, files = self._scan(below)
        yield from files
        for name in folders:
            yield from self._walk(name, (*above, here))

    def _check(self) -> None:
        """Open each image. Raise UserError, which names the first ones, if some cannot be read."""
        for name in chain(self.flat, *self.classes.values()):
            self._try(name)
        if self._broken:
            first = ", ".join(f"{name} ({why})" for name, why in list(self._broken.items())[:_SHOWN])
            more = f" and {len(self._broken) - _SHOWN} more" if len(self._broken) > _SHOWN else ""
            files = counted(len(self._broken), "file")
            fix = "remove broken links, and make other files readable or move them away"
            raise UserError(f"{self.root}: {files} cannot be read: {first}{more}; nothing was packed: {fix}")

    def _try(self, name: str) -> None:
        path = self.root / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe does not block
        except OSError as error:
            self._broken[name] = (path.is_symlink() and _BROKEN.get(error.errno or 0)) or os.strerror(error.errno or 0)
            return
        try:
            info = os.fstat(handle)
        finally:
            os.close(handle)
        if not stat.S_ISREG(info.st_mode):
            self._broken[name] = "not a regular file"
        elif not info.st_size and extension(name):
            self.remarks.empty.add(name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop
        return False


def _identity(folder: Path) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def extension(name: str) -> str | None:
    """Return the lower-case extension of an image; None if the file is not an image."""
    ext = name.rpartition(".")[2].lower()
    return ext if ext in IMAGES else None


def _keyed(folder: Path, names: list[str], label: int | None) -> Iterator[Image]:
    """Yield the images with unique keys. Images with the same stem get their extension appended."""
    plain = Counter(map(_key, names))
    taken: dict[str, str] = {}
    for name in names:
        key, ext = _key(name), extension(name)
        if plain[key] > 1:
            key = f"{key}-{ext}"
        if taken.setdefault(key, name) != name:
            raise UserError(f"{folder}: {taken[key]} and {name} would both have the key {key!r}; rename one of them")
        dropped = re.match(r"__[^/]*__/", key)  # by webdataset
        if ext is None or dropped or storable(key) != key or split_name(f"{key}.{ext}") != (key, ext):
            raise UserError(f"{str(folder / name)!r} cannot be a webdataset key; rename the file or its folder")
        yield Image(name, key, ext, label)


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0].replace('.', '-')}"
