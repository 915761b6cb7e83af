"""Read tar shards, local or in an object store, as streams of samples."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from pyarrow import fs
from webdataset.tariterators import base_plus_ext

from saltern.pipeline.shards.sources import LocalFile, Source
from saltern.pipeline.shards.tape import BLOCK, IMAGES, Tape
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.config import Members
from saltern.schemas.errors import ShardError, printable
from saltern.schemas.run import Shard
from saltern.schemas.saliency import DUPLICATE_KEY, MISSING_IMAGE, TOO_LARGE

MAX_MEMBER = 2**28  # bytes of a sample's members; those beyond are not read
Numbers = Mapping[int, int] | None  # the model's class for each number in `cls`; None: the same numbers
Exts = frozenset[str]
USUAL = Members()
_NUMBER = re.compile(rb"(?:\xef\xbb\xbf)?\s*([+-]?0*[0-9]{1,10})\s*")
_SHOWN = 8  # extensions in a message


@dataclass(slots=True)
class Sample:
    """One key of a shard with its members."""

    key: str
    index: int  # position in the shard, from 0
    members: dict[str, bytes] = field(default_factory=dict)  # by extension, lower case: only images, class and json
    problem: tuple[str, str] | None = None  # a status of saltern.schemas.saliency, and the reason
    numbers: Mapping[int, int] | None = None  # the model's class for each number in `cls`; None: the same numbers
    named: Members = USUAL

    @property
    def image(self) -> bytes | None:
        """The image file; of several, the first in the order of IMAGES, if none is named."""
        for ext in _images(self.named):
            if ext in self.members:
                return self.members[ext]
        return None

    @property
    def label(self) -> int | None:
        """The sample's class as the model numbers it; None if `given` is None, negative or not in `numbers`."""
        given = self.given
        if given is None:
            return None
        if self.numbers is not None:
            return self.numbers.get(given)
        return given if given >= 0 else None

    @property
    def given(self) -> int | None:
        """The class in `cls` or the named member; None if it is missing, no whole number or not of 32 bits."""
        text = self.class_text
        if len(text) < 10 and text.isdigit():  # twice as fast
            return int(text)
        match = _NUMBER.fullmatch(text)
        return int(match[1]) if match and abs(int(match[1])) < 2**31 else None

    @property
    def class_text(self) -> bytes:
        """The content of `cls` or the named member; empty if it is missing."""
        if self.named.label is None:
            return self.members.get("cls", b"")
        ext, _, key = self.named.label.partition(":")
        text = self.members.get(ext, b"")
        if not key:
            return text
        try:
            value = json.loads(text)[key]
        except (ValueError, LookupError, TypeError, RecursionError):
            return b""
        return b"" if isinstance(value, bool) else f"{value}".encode(errors="replace")

    @property
    def size(self) -> int:
        """The bytes of its members."""
        return sum(map(len, self.members.values()))

    def release(self) -> None:
        """Drop the members, except the class."""
        self.members = {} if self.given is None else {"cls": b"%d" % self.given}
        self.named = USUAL


def read_samples(
    shard: Shard, numbers: Numbers = None, *, named: Members = USUAL, as_listed: bool = False, more: Exts = frozenset()
) -> Iterator[Sample]:
    """Yield a shard's samples, only the first `shard.take` if that is set.

    Contiguous members with one key (the name up to its first dot) are one sample. A second member of the same name
    begins a new sample, which repeats the key.

    Args:
        shard: the shard to read.
        numbers: see Numbers.
        named: the members that hold image and class.
        as_listed: require the time of change that the listing gave, besides the size.
        more: extensions of further members to read. They count in `fold`.

    Raises:
        ShardError: the data is broken: cut, damaged, not a tar, or followed by other data.
        OSError: the environment is broken: network, permissions, missing file; or the file has another size than when
            it was listed, or changed while it was read.
    """
    with _opened(shard, seekable=False, as_listed=as_listed) as tape:
        yield from islice(_samples(_members(tape, data_of=_wanted(named) | more), numbers, named), shard.take)


def fold(crc: int, sample: Sample) -> int:
    """Return the CRC-32 of a shard's samples up to and including this one; `crc` is that of the samples before it."""
    head = f"{sample.key}\0".encode(errors="surrogateescape")
    for ext, data in sample.members.items():
        crc, head = zlib.crc32(data, zlib.crc32(head + f"{ext}\0{len(data)}\0".encode(), crc)), b""
    return zlib.crc32(head, crc)


def content_of(shard: Shard, *, named: Members = USUAL, as_listed: bool = False, more: Exts = frozenset()) -> str:
    """Return the CRC-32 of a shard's samples, 8 hex digits. It reads the whole tar.

    Args:
        shard, named, as_listed, more: as for `read_samples`.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    crc = 0
    for sample in read_samples(shard, named=named, as_listed=as_listed, more=more):
        crc = fold(crc, sample)
    return f"{crc:08x}"


def list_keys(shard: Shard) -> list[str]:
    """Return the keys of `read_samples`, in order, repeats included. Of a local tar only the headers are read.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        return [storable(next(iter(group.values())).key) for group in islice(_groups(_members(tape)), shard.take)]


def list_images(shard: Shard, *, named: Members = USUAL) -> Iterator[tuple[str, str | None]]:
    """Yield the key of each sample of `read_samples` and the name of its image file in the tar; None without one.

    Of a local tar only the headers are read.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        for group in islice(_groups(_members(tape)), shard.take):
            image = next((group[ext].name for ext in _images(named) if ext in group), None)
            yield storable(next(iter(group.values())).key), None if image is None else storable(image)


class Place(NamedTuple):
    """The place of a sample's image in its tar."""

    key: str
    offset: int  # of the image's bytes
    size: int  # bytes
    label: int | None  # as `Sample.label`


def locate_images(shard: Shard, numbers: Numbers = None, *, named: Members = USUAL) -> Iterator[Place]:
    """Yield the place of each image that `read_samples` gives, without repeats. On a local tar it only seeks.

    The shard must not be compressed.

    Args:
        shard, numbers, named: as of `read_samples`; the class is read from `cls`.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        seen: set[str] = set()
        members = _members(tape, data_of=frozenset({"cls"}), files=_wanted(named))
        for index, group in enumerate(islice(_groups(members), shard.take)):
            image = next((group[ext] for ext in _images(named) if ext in group), None)
            key = storable(next(iter(group.values())).key)
            if image is not None and image.size <= MAX_MEMBER and key not in seen:
                data = {ext: member.data for ext, member in group.items() if member.data is not None}
                yield Place(key, image.offset, image.size, Sample(key, index, data, numbers=numbers).label)
            seen.add(key)


@contextmanager
def _opened(shard: Shard, *, seekable: bool, as_listed: bool = False) -> Iterator[Tape]:
    """Open a shard, and check at the end that it did not change while it was read.

    Args:
        shard, as_listed: as in `read_samples`.
        seekable: let the reader seek if the shard is a local tar without compression.
    """
    store, path = filesystem(shard.url)
    info = store.get_file_info(path)
    _check_unchanged(shard if as_listed else replace(shard, mtime_ns=None), info)
    opened = replace(shard, mtime_ns=info.mtime_ns)
    with _tape(shard, store, path, seekable) as tape:
        try:
            yield tape
        except ShardError:
            _check_unchanged(opened, store.get_file_info(path))
            raise
        _check_unchanged(opened, store.get_file_info(path))


def _check_unchanged(shard: Shard, info: fs.FileInfo) -> None:
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{shard.url}: no such file")
    if info.type != fs.FileType.File:
        raise OSError(f"{shard.url}: not a regular file")
    if not shard.unchanged(info.size, info.mtime_ns):
        how = f"it had {shard.size} bytes and has {info.size}" if info.size != shard.size else "it was written again"
        raise OSError(f"{shard.url}: changed since it was listed ({how}); restore it, or run the command again")


@contextmanager
def _tape(shard: Shard, store: fs.FileSystem, path: str, seekable: bool) -> Iterator[Tape]:
    local, gzipped = isinstance(store, fs.LocalFileSystem), path.endswith((".gz", ".tgz"))
    if local and not gzipped:
        with open(path, "rb", buffering=0) as file:
            source = LocalFile(file.fileno(), shard.url, shard.size, BLOCK if seekable else 2**16)
            yield Tape(shard.url, source, shard.size, seekable=seekable)
        return
    # Each refill is one request to an object store. Python reads what is larger than its buffer without a copy.
    with store.open_input_stream(path, compression=None, buffer_size=None if local else 2**23) as raw:
        stream: Any = io.BufferedReader(Source(raw, shard.url, shard.size), 2**16)
        # Arrow's own decompressor raises the same errors for damaged data as for a broken network.
        yield Tape(shard.url, gzip.GzipFile(fileobj=stream) if gzipped else stream, None if gzipped else shard.size)


class _Member(NamedTuple):
    key: str
    ext: str  # lower case
    data: bytes | None  # None if it was not wanted, or is too large
    size: int  # bytes
    offset: int  # of the data in the tar
    name: str  # in the tar


def _members(tape: Tape, *, data_of: Exts = frozenset(), files: Exts = frozenset()) -> Iterator[_Member]:
    """Yield the members of samples, with the data of those with these extensions.

    Links are refused under the extensions `files`, by default those whose data is read, or could be.
    """
    key, held = "", 0  # the last sample's key, and the bytes of its data
    aside, first = 0, ""  # files that belong to no sample, while no sample was found
    files = files or data_of or _wanted(USUAL)
    for name, size, is_link in tape:
        named = split_name(name)
        if named is None:
            if not key:
                aside, first = aside + 1, first or name
            continue
        if is_link and named[1] in files:
            raise tape.error(f"{name!r} is a link without data (pack it with `tar -h --hard-dereference`)")
        if named[0] != key:
            key, held = named[0], 0
        wanted, offset = named[1] in data_of and held + size <= MAX_MEMBER, tape.position
        held += size if wanted else 0
        yield _Member(*named, tape.read(size) if wanted else None, size, offset, name)
    if aside and not key:
        raise tape.error(f"{aside} files, the first {first!r}, and none with a name such as a.jpg")


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension, as webdataset splits them; None if the file belongs to no sample.

    Hidden files (`._a.jpg`) and files without an extension (`README`) do not. Files of folders such as `__meta__/`
    do here, although webdataset drops them.
    """
    if "\n" in name:
        key, ext = base_plus_ext(name)
        return None if key is None or name.rpartition("/")[2].startswith(".") else (key, ext.lower())
    folder, slash, last = name.rpartition("/")  # four times as fast
    base, dot, ext = last.partition(".")
    return (f"{folder}{slash}{base}", ext.lower()) if base and dot else None


def storable(name: str) -> str:
    """Return a name with `\\xNN` for each byte that is not UTF-8, a lone surrogate, which Parquet does not take."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _samples(members: Iterable[_Member], numbers: Numbers, named: Members) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for index, group in enumerate(_groups(members)):
        key = storable(next(iter(group.values())).key)
        data = {ext: member.data for ext, member in group.items() if member.data is not None}
        sample = Sample(key, index, data, numbers=numbers, named=named)
        sample.problem = _problem(sample, group, seen.setdefault(key, index))
        yield sample


def _groups(members: Iterable[_Member]) -> Iterator[dict[str, _Member]]:
    """Yield the members of each sample, by extension."""
    group: dict[str, _Member] = {}
    key = ""
    for member in members:
        if group and (member.key != key or member.ext in group):
            yield group
            group = {}
        group[member.ext], key = member, member.key
    if group:
        yield group


def _problem(sample: Sample, group: dict[str, _Member], first: int) -> tuple[str, str] | None:
    if first != sample.index:
        fix = "give each sample its own key and keep its members together, as `saltern pack` does"
        return DUPLICATE_KEY, f"sample {first} of this shard already has the key; {fix}"
    for ext, member in group.items():
        if member.data is None and ext in _wanted(sample.named):
            return TOO_LARGE, f"the member .{ext} has {member.size} bytes; at most {MAX_MEMBER} are read of a sample"
    if sample.image is None:
        extensions = ", ".join(f".{printable(storable(ext))}" for ext in islice(group, _SHOWN))
        extensions += f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        other = next((ext for ext in group if ext.rpartition(".")[2] in IMAGES), "")
        fix = f"; name one with --image-member {printable(storable(other))}" if other else ""
        what = f".{sample.named.image}" if sample.named.image else "image"
        return (
            MISSING_IMAGE,
            f"no {what} among its members ({extensions}); a key ends at the first dot of the name{fix}",
        )
    return None


def _images(named: Members) -> tuple[str, ...]:
    return (named.image,) if named.image else IMAGES


@cache
def _wanted(named: Members) -> frozenset[str]:
    """Return the extensions of the members that are read."""
    return frozenset((*_images(named), (named.label or "cls").partition(":")[0], "json"))
