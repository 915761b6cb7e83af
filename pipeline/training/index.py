"""An index of training images: where each labelled image is in its tar, checked against the wanted classes.

Shape suffixes: N samples.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.shards.samples import USUAL, Place, locate_images
from saltern.schemas.config import Members
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

_THREADS = 8
_SHOWN = 5  # classes that an error names


@dataclass(frozen=True, eq=False)
class Index:
    """The samples in the order of the shards, except those of other classes, without an image or with a used key."""

    shards: Sequence[Shard]
    shard_N: NDArray[np.int64]  # number of the shard
    offset_N: NDArray[np.int64]  # of the image, bytes
    size_N: NDArray[np.int64]  # bytes
    label_N: NDArray[np.int64]  # position among the classes in play; for a localizer, number of the pseudo-label

    def __len__(self) -> int:
        return len(self.shard_N)


def make_index(
    shards: Sequence[Shard],
    count: int,
    classes: Sequence[int] | None = None,
    numbers: Mapping[int, int] | None = None,
) -> Index:
    """Index all shards. In local shards it seeks from header to header.

    Args:
        count: of the model's classes.
        classes: in play, in the order of the logits; None: all.
        numbers: the model's class for each number in `cls`; None: the same numbers.

    Raises:
        UserError: a shard is broken or compressed, a sample has no class or one that the model does not have, a
            requested class has no sample, or the shards have no samples.
        OSError: a shard cannot be read.
    """
    wanted = list(range(count)) if classes is None else list(classes)
    outside = [number for number in wanted if not 0 <= number < count]
    if outside:
        raise UserError(f"class {outside[0]} is out of range: the model has classes 0..{count - 1}")
    logit = {number: position for position, number in enumerate(wanted)}
    rows: list[tuple[int, int, int, int]] = []
    with ThreadPoolExecutor(_THREADS, "saltern-index") as pool:
        for number, places in enumerate(pool.map(partial(places_of, numbers=numbers), shards)):
            for place in places:
                label = _label(place, shards[number], count)
                if label in logit:
                    rows.append((number, place.offset, place.size, logit[label]))
    columns_4N = np.array(rows, np.int64).reshape(-1, 4).T.copy()
    index = Index(shards, *columns_4N)
    if not len(index):
        raise UserError("the shards hold no image of the classes to train on")
    if classes is not None:
        _check_complete(index, wanted)
    return index


def places_of(shard: Shard, numbers: Mapping[int, int] | None = None, named: Members = USUAL) -> list[Place]:
    """Return the place of each image of a shard.

    Args:
        numbers: the model's class for each number in `cls`; None: the same numbers.
        named: the members that hold image and class.

    Raises:
        UserError: the shard is broken or compressed.
    """
    if shard.url.endswith((".gz", ".tgz")):
        raise UserError(f"{shard.url}: training reads images in any order, and a compressed tar has one; gunzip it")
    try:
        return list(locate_images(shard, numbers, named=named))
    except ShardError as error:
        raise UserError(f"a shard is broken: {error}") from error


def _label(place: Place, shard: Shard, count: int) -> int:
    if place.label is None:
        raise UserError(
            f"{shard.url}: the sample {place.key!r} has no class; training needs a number from 0 in .cls (or --labels)"
        )
    if not 0 <= place.label < count:
        raise UserError(
            f"{shard.url}: the sample {place.key!r} is of class {place.label}, out of range: the model has classes "
            f"0..{count - 1}; train a model that has it"
        )
    return place.label


def _check_complete(index: Index, wanted: list[int]) -> None:
    counts = np.bincount(index.label_N, minlength=len(wanted)).tolist()
    missing = [number for number, samples in zip(wanted, counts, strict=True) if not samples]
    if missing:
        named = ", ".join(map(str, missing[:_SHOWN])) + (f" and {len(missing) - _SHOWN} more" * (len(missing) > _SHOWN))
        raise UserError(f"--classes: no sample in the shards is of class {named}; leave it out, or give its shards")
