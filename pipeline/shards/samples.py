"""Tar shards, local or in an object store, as streams of samples."""

import gzip
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from pyarrow import fs
from webdataset.handlers import reraise_exception
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from saltern.pipeline.shards.tape import IMAGES, Source, Tape, TapeError
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
    members: dict[str, bytes] = field(default_factory=dict)  # by extension, lower case: images, cls and json alone
    problem: tuple[str, str] | None = None  # a status of saltern.schemas.saliency, and the reason in words

    @property
    def image(self) -> bytes | None:
        """The image file; of several the first in the order of IMAGES."""
        return next((self.members[ext] for ext in IMAGES if ext in self.members), None)

    @property
    def label(self) -> int | None:
        """The class in `cls`; None where that is absent, no number, or none that fits in 32 bits."""
        try:
            label = int(self.members["cls"])
        except (KeyError, ValueError):
            return None
        return label if abs(label) < 2**31 else None


class _Member(NamedTuple):
    key: str
    ext: str  # lower case
    data: bytes | None  # None where it was not wanted, or is too large
    size: int


def read_samples(shard: Shard) -> Iterator[Sample]:
    """Streams a shard's samples, the first `shard.take` where that is set.

    Contiguous members with one key (the name up to its first dot) are one sample. A member whose name the sample has
    already begins the next sample, which is then a repeat of the key.

    Raises:
        ShardError: the data is broken: cut, damaged, no tar, followed by something else, or not of the planned size.
        OSError: the world is broken: network, permissions, file gone.
    """
    with _opened(shard, hollow=False) as tape:
        yield from _samples(shard, tape)


def list_keys(shard: Shard) -> list[str]:
    """The keys that `read_samples` gives, in order, repeats included; errors likewise. On a local tar it only seeks."""
    with _opened(shard, hollow=True) as tape:
        return [sample.key for sample in _samples(shard, tape)]


@contextmanager
def _opened(shard: Shard, *, hollow: bool) -> Iterator[Tape]:
    store, path = filesystem(shard.url)
    info = store.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{shard.url}: no such file")
    if info.size != shard.size:
        changed = f"has {info.size} bytes, and had {shard.size} when the run was planned"
        raise ShardError(f"{shard.url}: {changed}; restore it, or plan a new run")
    local, gzipped = isinstance(store, fs.LocalFileSystem), path.endswith((".gz", ".tgz"))
    if hollow and local and not gzipped:
        with store.open_input_file(path) as raw:
            yield Tape(shard.url, Source(raw, shard.url, shard.size), shard.size, hollow=True)
        return
    buffer = 2**20 if local else 2**23  # a store answers each refill with a request of its own
    with store.open_input_stream(path, compression=None, buffer_size=buffer) as raw:
        source: Any = Source(raw, shard.url, shard.size)
        # Not Arrow's decompressor: its errors cannot be told from those of the network.
        yield Tape(shard.url, gzip.GzipFile(fileobj=source) if gzipped else source, None if gzipped else shard.size)


def _samples(shard: Shard, tape: Tape) -> Iterator[Sample]:
    try:
        yield from islice(_grouped(_members(tape)), shard.take)
    except TapeError as error:
        raise ShardError(f"{shard.url}: {error.reason}") from error
    except (tarfile.TarError, ValueError) as error:
        raise ShardError(f"{shard.url}: {tape.error(f'damaged tar header ({error})').reason}") from error


def _members(tape: Tape) -> Iterator[_Member]:
    """The tar's files in order, wanted or not."""
    passed: list[_Member] = []

    def wanted(name: str) -> bool:
        named = split_name(name)
        if named is None:
            return False
        if named[1] in _WANTED and tape.size <= MAX_MEMBER:
            return True
        passed.append(_Member(*named, None, tape.size))
        return False

    for found in tar_file_iterator(tape, handler=reraise_exception, select_files=wanted):
        yield from passed
        passed.clear()
        if named := split_name(found["fname"]):
            yield _Member(*named, found["data"], len(found["data"]))
    if not tape.ended:
        raise tape.error("a tar header that cannot be followed")
    yield from passed


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension, as webdataset splits them; None for no sample's member (`._a.jpg`, `README`)."""
    if re.search(r"(^|/)(\.[^/]*|__MACOSX/.*)$", name):
        return None
    key, ext = base_plus_ext(name)
    if key is None:
        return None
    # What is no UTF-8 in the tar comes as lone surrogates, which no Parquet file takes.
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), ext.lower()


def _grouped(members: Iterable[_Member]) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for index, group in enumerate(_groups(members)):
        key = group[0].key
        sample = Sample(key, index, {member.ext: member.data for member in group if member.data is not None})
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
        fix = "give each sample a key of its own, its members side by side, as `saltern pack` does"
        return DUPLICATE_KEY, f"sample {first} of this shard has the key already; {fix}"
    for member in group:
        if member.data is None and member.ext in _WANTED:
            return TOO_LARGE, f"the member .{member.ext} has {member.size} bytes; at most {MAX_MEMBER} are read"
    if sample.image is None:
        found = ", ".join(f".{member.ext}" for member in group)
        return MISSING_IMAGE, f"no image among its members ({found}); a key ends at the first dot of the name"
    return None
