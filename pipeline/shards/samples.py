"""Read tar shards, local or in an object store, as streams of samples."""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from pyarrow import fs
from webdataset.tariterators import base_plus_ext

from saltern.pipeline.shards.tape import IMAGES, Source, Tape
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.errors import ShardError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import DUPLICATE_KEY, MISSING_IMAGE, TOO_LARGE

MAX_MEMBER = 2**28  # bytes; a larger one is not read
_WANTED = frozenset((*IMAGES, "cls", "json"))


@dataclass(slots=True)
class Sample:
    """One key of a shard with its members."""

    key: str
    index: int  # position in the shard, from 0
    members: dict[str, bytes] = field(default_factory=dict)  # by extension, lower case: only images, cls and json
    problem: tuple[str, str] | None = None  # a status of saltern.schemas.saliency, and the reason
    numbers: Mapping[int, int] | None = None  # the model's class for each number in `cls`; None: the same numbers

    @property
    def image(self) -> bytes | None:
        """The image file; of several, the first in the order of IMAGES."""
        return next((self.members[ext] for ext in IMAGES if ext in self.members), None)

    @property
    def label(self) -> int | None:
        """The sample's class as the model numbers it; None if `given` is None or is not in `numbers`."""
        given = self.given
        return given if self.numbers is None or given is None else self.numbers.get(given)

    @property
    def given(self) -> int | None:
        """The class in `cls`; None if it is missing, not a whole number, or does not fit in 32 bits."""
        try:
            label = int(self.members["cls"])
        except (KeyError, ValueError):
            return None
        return label if abs(label) < 2**31 else None


def read_samples(shard: Shard, numbers: Mapping[int, int] | None = None) -> Iterator[Sample]:
    """Yield a shard's samples, only the first `shard.take` if that is set.

    Contiguous members with one key (the name up to its first dot) are one sample. A second member of the same name
    begins a new sample, which repeats the key.

    Args:
        numbers: the model's class for each number in `cls`; None: the same numbers.

    Raises:
        ShardError: the data is broken: cut, damaged, not a tar, followed by other data, or not of the planned size.
        OSError: the environment is broken: network, permissions, missing file.
    """
    with _opened(shard, seekable=False) as tape:
        yield from islice(_samples(_members(tape, data_of=_WANTED), numbers), shard.take)


def fold(crc: int, sample: Sample) -> int:
    """Return the CRC-32 of a shard's samples up to and including this one; `crc` is that of the samples before it."""
    crc = zlib.crc32(f"{sample.key}\0".encode(errors="surrogateescape"), crc)
    for ext, data in sample.members.items():
        crc = zlib.crc32(data, zlib.crc32(f"{ext}\0{len(data)}\0".encode(), crc))
    return crc


def content_of(shard: Shard) -> str:
    """Return the CRC-32 of a shard's samples, 8 hex digits. It reads the whole tar.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    crc = 0
    for sample in read_samples(shard):
        crc = fold(crc, sample)
    return f"{crc:08x}"


def list_keys(shard: Shard) -> list[str]:
    """Return the keys of `read_samples`, in order, repeats included. Of a local tar only the headers are read.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        return [group[0].key for group in islice(_groups(_members(tape)), shard.take)]


class Place(NamedTuple):
    """The place of a sample's image in its tar."""

    key: str
    offset: int  # of the image's bytes
    size: int  # bytes
    label: int | None  # as `Sample.label`


def locate_images(shard: Shard, numbers: Mapping[int, int] | None = None) -> Iterator[Place]:
    """Yield the place of each image that `read_samples` gives, without repeats. On a local tar it only seeks.

    The shard must not be compressed.

    Raises:
        ShardError, OSError: as `read_samples`.
    """
    with _opened(shard, seekable=True) as tape:
        seen: set[str] = set()
        for index, group in enumerate(islice(_groups(_members(tape, data_of=frozenset({"cls"}))), shard.take)):
            members = {member.ext: member for member in group}
            image = next((members[ext] for ext in IMAGES if ext in members), None)
            key = group[0].key
            if image is not None and image.size <= MAX_MEMBER and key not in seen:
                data = {member.ext: member.data for member in group if member.data is not None}
                yield Place(key, image.offset, image.size, Sample(key, index, data, numbers=numbers).label)
            seen.add(key)


@contextmanager
def _opened(shard: Shard, *, seekable: bool) -> Iterator[Tape]:
    """Open a shard; with `seekable`, so that its reader can seek if it is a local tar without compression."""
    store, path = filesystem(shard.url)
    info = store.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{shard.url}: no such file")
    if info.size != shard.size:
        changed = f"has {info.size} bytes, and had {shard.size} when the run was planned"
        raise ShardError(f"{shard.url}: {changed}; restore it, or plan a new run")
    local, gzipped = isinstance(store, fs.LocalFileSystem), path.endswith((".gz", ".tgz"))
    if seekable and local and not gzipped:
        with store.open_input_file(path) as raw:
            yield Tape(shard.url, Source(raw, shard.url, shard.size), shard.size, seekable=True)
        return
    buffer = 2**20 if local else 2**23  # each refill is one request to an object store
    with store.open_input_stream(path, compression=None, buffer_size=buffer) as raw:
        source: Any = Source(raw, shard.url, shard.size)
        # Arrow's own decompressor raises the same errors for damaged data as for a broken network.
        yield Tape(shard.url, gzip.GzipFile(fileobj=source) if gzipped else source, None if gzipped else shard.size)


class _Member(NamedTuple):
    key: str
    ext: str  # lower case
    data: bytes | None  # None if it was not wanted, or is too large
    size: int  # bytes
    offset: int  # of the data in the tar


def _members(tape: Tape, *, data_of: frozenset[str] = frozenset()) -> Iterator[_Member]:
    """Yield the members of samples, with the data of those with these extensions."""
    for name, size in tape:
        if named := split_name(name):
            wanted, offset = named[1] in data_of and size <= MAX_MEMBER, tape.position
            yield _Member(*named, tape.read(size) if wanted else None, size, offset)


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension, as webdataset splits them; None if the file belongs to no sample.

    Hidden files (`._a.jpg`), metadata (`__meta__/a.jpg`) and files without an extension (`README`) do not.
    """
    if re.search(r"^__[^/]*__(/|$)|(^|/)(\.[^/]*|__MACOSX/.*)$", name):
        return None
    key, ext = base_plus_ext(name)
    if key is None:
        return None
    # Bytes that are not UTF-8 are lone surrogates here, which Parquet does not take.
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), ext.lower()


def _samples(members: Iterable[_Member], numbers: Mapping[int, int] | None) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for index, group in enumerate(_groups(members)):
        key = group[0].key
        data = {member.ext: member.data for member in group if member.data is not None}
        sample = Sample(key, index, data, numbers=numbers)
        sample.problem = _problem(sample, group, seen.setdefault(key, index))
        yield sample


def _groups(members: Iterable[_Member]) -> Iterator[list[_Member]]:
    group: list[_Member] = []
    for member in members:
        if group and (member.key != group[0].key or any(member.ext == other.ext for other in group)):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _problem(sample: Sample, group: list[_Member], first: int) -> tuple[str, str] | None:
    if first != sample.index:
        fix = "give each sample its own key and keep its members together, as `saltern pack` does"
        return DUPLICATE_KEY, f"sample {first} of this shard already has the key; {fix}"
    for member in group:
        if member.data is None and member.ext in _WANTED:
            return TOO_LARGE, f"the member .{member.ext} has {member.size} bytes; at most {MAX_MEMBER} are read"
    if sample.image is None:
        extensions = ", ".join(f".{member.ext}" for member in group)
        return MISSING_IMAGE, f"no image among its members ({extensions}); a key ends at the first dot of the name"
    return None
