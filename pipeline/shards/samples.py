"""Read tar shards, local or in an object store, as streams of samples."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from pyarrow import fs

from saltern.pipeline.shards.members import MAX_MEMBER, Exts, Group, groups, images, storable, wanted
from saltern.pipeline.shards.sources import Data, LocalFile, Source, Window
from saltern.pipeline.shards.tape import BLOCK, IMAGES, Tape
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.config import Members
from saltern.schemas.errors import ShardError, printable
from saltern.schemas.run import Shard
from saltern.schemas.saliency import DUPLICATE_KEY, MISSING_IMAGE, TOO_LARGE

Numbers = Mapping[int, int] | None  # the model's class for each number in `cls`; None: the same numbers
USUAL = Members()
_NUMBER = re.compile(rb"(?:\xef\xbb\xbf)?\s*([+-]?0*[0-9]{1,10})\s*")
_SHOWN = 8  # extensions in a message
_AHEAD = 2**22  # bytes of a shard that are read at once
_FEW = 2**11  # bytes whose CRC is computed together with what precedes them; for more, zlib releases the GIL


@dataclass(slots=True)
class Sample:
    """One key of a shard with its members."""

    key: str
    index: int  # position in the shard, from 0
    members: dict[str, Data] = field(default_factory=dict)  # by extension, lower case: only images, class and json
    problem: tuple[str, str] | None = None  # a status of saltern.schemas.saliency, and the reason
    numbers: Mapping[int, int] | None = None  # the model's class for each number in `cls`; None: the same numbers
    named: Members = USUAL

    @property
    def image(self) -> bytes | None:
        """The image file; of several, the first in the order of IMAGES, if none is named."""
        data = self.shared_image
        return None if data is None else bytes(data)

    @property
    def shared_image(self) -> Data | None:
        """The image file as it was read, without a copy."""
        for ext in images(self.named):
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
            return bytes(self.members.get("cls", b""))
        ext, _, key = self.named.label.partition(":")
        text = bytes(self.members.get(ext, b""))
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
    shard: Shard,
    numbers: Numbers = None,
    *,
    named: Members = USUAL,
    as_listed: bool = False,
    more: Exts = frozenset(),
    shared: bool = False,
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
        shared: give large members as parts of the memory that they were read into, which each of them keeps.

    Raises:
        ShardError: the data is broken: cut, damaged, not a tar, or followed by other data.
        OSError: the environment is broken: network, permissions, missing file; or the file has another size than when
            it was listed, or changed while it was read.
    """
    with _opened(shard, seekable=False, as_listed=as_listed) as tape:
        found = groups(tape, data_of=wanted(named) | more, shared=shared)
        yield from islice(_samples(found, numbers, named), shard.take)


def fold(crc: int, sample: Sample) -> int:
    """Return the CRC-32 of a shard's samples up to and including this one; `crc` is that of the samples before it."""
    head = f"{sample.key}\0"
    for ext, data in sample.members.items():
        said, head = f"{head}{ext}\0{len(data)}\0".encode(errors="surrogateescape"), ""
        crc = zlib.crc32(said + data, crc) if len(data) < _FEW else zlib.crc32(data, zlib.crc32(said, crc))
    return zlib.crc32(head.encode(errors="surrogateescape"), crc) if head else crc


def content_of(shard: Shard, *, named: Members = USUAL, as_listed: bool = False, more: Exts = frozenset()) -> str:
    """Return the CRC-32 of a shard's samples, 8 hex digits. It reads the whole tar.

    Args:
        shard, named, as_listed, more: as for `read_samples`.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    crc = 0
    for sample in read_samples(shard, named=named, as_listed=as_listed, more=more, shared=True):
        crc = fold(crc, sample)
    return f"{crc:08x}"


def list_keys(shard: Shard) -> list[str]:
    """Return the keys of `read_samples`, in order, repeats included. Of a local tar only the headers are read.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        return [storable(key) for key, _ in islice(groups(tape), shard.take)]


def list_images(shard: Shard, *, named: Members = USUAL) -> Iterator[tuple[str, str | None]]:
    """Yield the key of each sample of `read_samples` and the name of its image file in the tar; None without one.

    Of a local tar only the headers are read.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        for key, group in islice(groups(tape), shard.take):
            image = next((group[ext].name for ext in images(named) if ext in group), None)
            yield storable(key), None if image is None else storable(image)


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
        found = groups(tape, data_of=frozenset({"cls"}), files=wanted(named))
        for index, (name, group) in enumerate(islice(found, shard.take)):
            image = next((group[ext] for ext in images(named) if ext in group), None)
            key = storable(name)
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
            source = LocalFile(file.fileno(), shard.url, shard.size)
            window = Window(source.readinto, BLOCK, source.seek) if seekable else Window(source.readinto, _AHEAD)
            yield Tape(shard.url, window, shard.size, together=not seekable)
        return
    # Each refill is one request to an object store.
    with store.open_input_stream(path, compression=None, buffer_size=None if local else 2**23) as raw:
        stream = Source(raw, shard.url, shard.size)
        if not gzipped:
            yield Tape(shard.url, Window(stream.readinto, _AHEAD), shard.size)
            return
        # Arrow's own decompressor raises the same errors for damaged data as for a broken network.
        with gzip.GzipFile(fileobj=io.BufferedReader(stream, 2**16)) as unpacked:
            yield Tape(shard.url, Window(unpacked.readinto1, _AHEAD), None)


def _samples(found: Iterable[tuple[str, Group]], numbers: Numbers, named: Members) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for index, (name, group) in enumerate(found):
        key = storable(name)
        data = {ext: member.data for ext, member in group.items() if member.data is not None}
        sample = Sample(key, index, data, None, numbers, named)
        first = seen.setdefault(key, index)
        if first != index or len(data) < len(group) or sample.shared_image is None:
            sample.problem = _problem(sample, group, first)
        yield sample


def _problem(sample: Sample, group: Group, first: int) -> tuple[str, str] | None:
    if first != sample.index:
        fix = "give each sample its own key and keep its members together, as `saltern pack` does"
        return DUPLICATE_KEY, f"sample {first} of this shard already has the key; {fix}"
    for ext, member in group.items():
        if member.data is None and ext in wanted(sample.named):
            return TOO_LARGE, f"the member .{ext} has {member.size} bytes; at most {MAX_MEMBER} are read of a sample"
    if sample.shared_image is None:
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
