"""Split classes into the subsets A to F of the unseen-class experiment, and check that shards can judge each class."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from saltern.pipeline.naming import brief
from saltern.pipeline.shards.annotations import read_annotation
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

SUBSETS = {"A": 50, "B": 50, "C": 100, "D": 300, "E": 300, "F": 200}  # number of classes, of 1,000
_SHOWN = 5  # classes that an error names

Split = dict[str, list[int]]  # subset -> its classes, ascending


def sizes(count: int) -> dict[str, int]:
    """Return the number of classes of each subset: the published proportions by largest remainder, at least one each.

    Raises:
        UserError: fewer classes than subsets.
    """
    if count < len(SUBSETS):
        raise UserError(
            f"{count} classes cannot be split into {len(SUBSETS)} subsets; at least {len(SUBSETS)} are needed"
        )
    whole = sum(SUBSETS.values())
    numbers = {name: count * share // whole for name, share in SUBSETS.items()}
    by_remainder = sorted(SUBSETS, key=lambda name: -(count * SUBSETS[name] % whole))  # stable: the first of equals
    for name in by_remainder[: count - sum(numbers.values())]:
        numbers[name] += 1
    for name in SUBSETS:
        if not numbers[name]:
            numbers[max(numbers, key=lambda other: numbers[other])] -= 1
            numbers[name] = 1
    return numbers


def make_split(classes: Iterable[int], seed: int) -> Split:
    """Draw the split, which depends only on the set of classes and the seed. Raises UserError as `sizes` does."""
    ordered = sorted(classes)
    random.Random(f"unseen classes {seed}").shuffle(ordered)
    split, start = {}, 0
    for name, size in sizes(len(ordered)).items():
        split[name] = sorted(ordered[start : start + size])
        start += size
    return split


def check_val(
    shards: Sequence[Shard],
    split: Split,
    count: int,
    say: Callable[[str], None],
    numbers: Mapping[int, int] | None = None,
) -> None:
    """Check that the validation shards have samples with boxes of every class; read them once.

    Args:
        count: of the model's classes.
        numbers: the model's class for each number in `cls`; None: the same numbers.

    Raises:
        UserError: a class has no sample, or no sample with boxes; the model does not have a label; a shard cannot be
            read.
    """
    subset_of = {label: name for name, classes in split.items() for label in classes}
    samples: Counter[int] = Counter()
    boxed: Counter[int] = Counter()
    bad, others = "", 0
    for shard, sample in _samples(shards, numbers):
        label = sample.label
        if label is not None and not 0 <= label < count:
            where = f"--val: {shard.url}: the sample {sample.key!r}"
            raise UserError(f"{where} is of class {label}, out of range: the model has classes 0..{count - 1}")
        if label not in subset_of:
            others += 1
            continue
        samples[label] += 1
        try:
            boxed[label] += read_annotation(sample) is not None
        except ValueError as error:
            bad = bad or f"; {shard.url}: {sample.key!r}: {error}"
    _check_complete(subset_of, samples, "no sample", "give their shards")
    _check_complete(subset_of, boxed, "no sample with boxes", f"`saltern pack --boxes` packs them{bad}")
    if others:
        say(f"{others:,} samples in the --val shards have another class, or none; they are not judged")


def _samples(shards: Sequence[Shard], numbers: Mapping[int, int] | None) -> Iterator[tuple[Shard, Sample]]:
    for shard in shards:
        try:
            for sample in read_samples(shard, numbers):
                yield shard, sample
        except (ShardError, OSError) as error:
            raise UserError(f"--val: {brief(error)}") from error


def _check_complete(subset_of: Mapping[int, str], counts: Mapping[int, int], what: str, fix: str) -> None:
    lacking = [label for label in sorted(subset_of) if not counts[label]]
    if lacking:
        shown = ", ".join(f"{label} (in {subset_of[label]})" for label in lacking[:_SHOWN])
        more = f" and {len(lacking) - _SHOWN} more" * (len(lacking) > _SHOWN)
        raise UserError(f"--val: {what} is of class {shown}{more}; leave the class out by --classes, or {fix}")
