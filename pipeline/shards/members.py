"""The members of samples in a tar: files with one key, the name up to its first dot, that follow each other."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from saltern.pipeline.shards.sources import Data
from saltern.pipeline.shards.tape import IMAGES, Tape
from saltern.schemas.config import Members

MAX_MEMBER = 2**28  # bytes of a sample's members; those beyond are not read
_SMALL = 2**14  # bytes of data that is copied, so that it does not keep megabytes in memory
Exts = frozenset[str]


class Member(NamedTuple):
    """A file of a sample."""

    data: Data | None  # None if it was not wanted, or is too large
    size: int  # bytes
    offset: int  # of the data in the tar
    name: str  # in the tar


Group = dict[str, Member]  # the members of a sample, by extension, lower case


def groups(
    tape: Tape, *, data_of: Exts = frozenset(), files: Exts = frozenset(), shared: bool = False
) -> Iterator[tuple[str, Group]]:
    """Yield key and members of each sample, with the data of those with the extensions `data_of`.

    A second member of the same name begins a new sample, which repeats the key.

    Args:
        tape: the tar.
        data_of: extensions.
        files: links are refused under these extensions, by default those whose data is read, or could be.
        shared: give large data as parts of the memory that it was read into, without a copy. If most of the tar is not
            read, data is copied nevertheless, as it would keep that memory.
    """
    files = files or data_of or wanted(Members())
    key, held = "", 0  # the current key, and the bytes of the data of its members
    balance = 0  # bytes of data that was read, less those of data that was not
    group: Group = {}
    for own, ext, size, name in _named(tape, files):
        if own != key or ext in group:
            if group:
                yield key, group
                group = {}
            key, held = own, held if own == key else 0
        offset, data = tape.position, None
        if ext in data_of and held + size <= MAX_MEMBER:
            held, balance = held + size, balance + size
            read = tape.read(size)
            data = read if shared and size >= _SMALL and balance >= 0 else bytes(read)
        else:
            balance -= size
        group[ext] = Member(data, size, offset, name)
    if group:
        yield key, group


def _named(tape: Tape, files: Exts) -> Iterator[tuple[str, str, int, str]]:
    """Yield key, extension, size and name of the files that belong to samples."""
    found, aside, first = False, 0, ""  # whether there is one; those that are none
    for name, size, is_link in tape:
        named = split_name(name)
        if named is None:
            aside, first = aside + 1, first or name
            continue
        found = True
        if is_link and named[1] in files:
            raise tape.error(f"{name!r} is a link without data (pack it with `tar -h --hard-dereference`)")
        yield *named, size, name
    if aside and not found:
        raise tape.error(f"{aside} files, the first {first!r}, and none with a name such as a.jpg")


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension, as webdataset splits them; None if the file belongs to no sample.

    Hidden files (`._a.jpg`) and files without an extension (`README`) do not. Files of folders such as `__meta__/`
    do here, although webdataset drops them.
    """
    key, dot, ext = name.partition(".")
    if "/" not in ext and "\n" not in name:  # several times as fast
        return (key, ext.lower()) if dot and key and key[-1] != "/" else None
    base, ext = base_plus_ext(name)
    return None if base is None or name.rpartition("/")[2].startswith(".") else (base, ext.lower())


def storable(name: str) -> str:
    """Return a name with `\\xNN` for each byte that is not UTF-8, a lone surrogate, which Parquet does not take."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def images(named: Members) -> tuple[str, ...]:
    """Return the extensions of image files, the preferred first."""
    return (named.image,) if named.image else IMAGES


@cache
def wanted(named: Members) -> Exts:
    """Return the extensions of the members that are read."""
    return frozenset((*images(named), (named.label or "cls").partition(":")[0], "json"))
