"""Where each labelled image lies in its tar, checked against the classes that are wanted.

Shape suffixes: N samples.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from saltern.pipeline.shards.samples import MAX_MEMBER, list_keys, split_name
from saltern.pipeline.shards.tape import IMAGES
from saltern.pipeline.storage.filesystem import filesystem
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

_THREADS = 8
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps to itself
_SHOWN = 5


class _Place(NamedTuple):
    key: str
    offset: int  # of the image's bytes in the tar
    size: int
    label: int | None  # None where `cls` is absent or no number


@dataclass(frozen=True, eq=False)
class Index:
    """The samples in the order of the shards; those of other classes, without image or with a key again left out."""

    shards: Sequence[Shard]
    shard_N: NDArray[np.int64]  # number of the shard
    offset_N: NDArray[np.int64]  # of the image, bytes
    size_N: NDArray[np.int64]  # bytes
    label_N: NDArray[np.int64]  # position among the classes in play

    def __len__(self) -> int:
        return len(self.shard_N)


def make_index(shards: Sequence[Shard], count: int, classes: Sequence[int] | None = None) -> Index:
    """Looks through all shards; on local ones it only seeks.

    Args:
        count: of the model's classes.
        classes: in play, in the order of the logits; None: all.

    Raises:
        UserError: a shard that is broken or compressed, a sample without a class or with one that the model has not,
            a wanted class without sample, or no sample at all.
        OSError: a shard that cannot be read.
    """
    wanted = list(range(count)) if classes is None else list(classes)
    outside = [number for number in wanted if not 0 <= number < count]
    if outside:
        raise UserError(f"class {outside[0]} is out of range: the model has classes 0..{count - 1}")
    logit = {number: position for position, number in enumerate(wanted)}
    rows: list[tuple[int, int, int, int]] = []
    with ThreadPoolExecutor(_THREADS, "saltern-index") as pool:
        for number, places in enumerate(pool.map(_scan, shards)):
            for place in places:
                label = _checked(place, shards[number], count)
                if label in logit:
                    rows.append((number, place.offset, place.size, logit[label]))
    columns_4N = np.array(rows, np.int64).reshape(-1, 4).T.copy()
    index = Index(shards, *columns_4N)
    if not len(index):
        raise UserError("the shards hold no image of the classes to train on")
    if classes is not None:
        _complete(index, wanted)
    return index


def _complete(index: Index, wanted: list[int]) -> None:
    there = np.bincount(index.label_N, minlength=len(wanted))
    missing = [number for number, found in zip(wanted, there.tolist(), strict=True) if not found]
    if missing:
        named = ", ".join(map(str, missing[:_SHOWN])) + (f" and {len(missing) - _SHOWN} more" * (len(missing) > _SHOWN))
        raise UserError(f"--classes: no sample in the shards is of class {named}; leave it out, or give its shards")


def _checked(place: _Place, shard: Shard, count: int) -> int:
    if place.label is None:
        raise UserError(f"{shard.url}: the sample {place.key!r} has no class; training needs a number in .cls")
    if not 0 <= place.label < count:
        raise UserError(
            f"{shard.url}: the sample {place.key!r} is of class {place.label}, out of range: the model has classes "
            f"0..{count - 1}; train a model that has it"
        )
    return place.label


def _scan(shard: Shard) -> list[_Place]:
    if shard.url.endswith((".gz", ".tgz")):
        raise UserError(f"{shard.url}: training reads images in any order, which no compressed tar allows; gunzip it")
    try:
        keys = list_keys(shard)  # proves the tar whole, which tarfile does not
        samples = list(_samples(shard))
    except (ShardError, tarfile.TarError) as error:
        raise UserError(f"a shard is broken: {error}") from error
    if [key for key, _ in samples] != keys[: shard.take]:
        raise UserError(f"{shard.url}: its samples cannot be told apart; repack its images with `saltern pack`")
    seen: set[str] = set()
    found: list[_Place] = []
    for key, place in samples:
        if place is not None and key not in seen:
            found.append(place)
        seen.add(key)
    return found


def _samples(shard: Shard) -> Iterator[tuple[str, _Place | None]]:
    """Key and place of each sample, grouped as `read_samples` does; None: no image that can be read."""
    group: dict[str, tuple[int, int]] = {}
    label, current, given = None, "", 0
    with _members(shard) as tar:
        for info in tar:
            named = split_name(info.name) if info.isreg() and not _META.search(info.name) else None
            if named is None:
                continue
            key, ext = named
            if group and (key != current or ext in group):
                yield current, _place(current, group, label)
                group, label, given = {}, None, given + 1
            if given == shard.take:
                return
            current = key
            group[ext] = (info.offset_data, info.size)
            if ext == "cls":
                label = _number(tar, info)
        if group:
            yield current, _place(current, group, label)


def _place(key: str, group: dict[str, tuple[int, int]], label: int | None) -> _Place | None:
    offset, size = next((group[ext] for ext in IMAGES if ext in group), (0, MAX_MEMBER + 1))
    return None if size > MAX_MEMBER else _Place(key, offset, size, label)


def _number(tar: tarfile.TarFile, info: tarfile.TarInfo) -> int | None:
    content = tar.extractfile(info)
    try:
        label = None if content is None else int(content.read(64))
    except ValueError:
        return None
    return label if label is not None and abs(label) < 2**31 else None


@contextmanager
def _members(shard: Shard) -> Iterator[tarfile.TarFile]:
    store, path = filesystem(shard.url)
    if isinstance(store, fs.LocalFileSystem):
        with tarfile.open(path, "r:") as tar:
            yield tar
        return
    # One stream: each header by itself would be a request.
    with (
        store.open_input_stream(path, compression=None, buffer_size=2**23) as raw,
        tarfile.open(fileobj=raw, mode="r|") as tar,
    ):
        yield tar
