"""Match the classes of a dataset with those of a model, by their names.

A dataset's names are in `classes.json` next to its shards, or in the samples' json members. A model's names come with
its weights.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.samples import read_samples
from saltern.pipeline.storage.store import Store
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

FILE = "classes.json"  # {"0": name, ...}, next to the shards
IMAGENET = "imagenet"
_FOLDERS = 16  # of shards, in which FILE is looked for
_PEEKED = 4, 32  # shards without FILE that are read, and samples of each
_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")

Names = dict[int, str]  # by the class's number


def imagenet_names() -> list[str]:
    """Return torchvision's names of ImageNet's 1,000 classes."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


class Vocabulary:
    """The numbers of a model's classes, by name. ImageNet's are also known by WordNet id (n01440764).

    Names are compared without case, `_` and `-`. Of `tench, Tinca tinca` each part is a name.

    Args:
        names: in the order of the numbers.
    """

    def __init__(self, names: Sequence[str]):
        self._numbers: dict[str, set[int]] = {}
        for number, name in enumerate(names):
            for word in _words(name):
                self._numbers.setdefault(word, set()).add(number)
        if len(names) == 1000 and list(names) == imagenet_names():
            for number, wnid in enumerate(_WNIDS.read_text().split()):
                self._numbers[wnid] = {number}

    def __call__(self, name: str) -> set[int]:
        """Return the classes with this name; several if the name does not tell them apart."""
        return next((self._numbers[word] for word in _words(name) if word in self._numbers), set())


def _words(name: str) -> list[str]:
    """Return the forms of a name that are compared, the whole name first."""
    wnid = re.match(r"n\d{8}(?!\d)", name)
    words = [name, *name.split(","), wnid.group() if wnid else ""]
    plain = (" ".join(re.split(r"[\s_-]+", word.casefold())).strip() for word in words)
    return list(dict.fromkeys(filter(None, plain)))


@dataclass
class Match:
    """The classes of a dataset, sorted by whether the model has their names."""

    same: list[int] = field(default_factory=list)  # at the same number
    moved: dict[int, int] = field(default_factory=dict)  # at this other number
    unknown: list[int] = field(default_factory=list)  # nowhere, or at several numbers

    @property
    def agrees(self) -> bool:
        """Whether the numbers are the model's. Names of one class differ between lists, so half of them suffice."""
        return 2 * len(self.same) >= self.count and 10 * len(self.moved) <= self.count

    @property
    def count(self) -> int:
        return len(self.same) + len(self.moved) + len(self.unknown)

    @property
    def numbers(self) -> dict[int, int]:
        """The model's number of each class that it has."""
        return {**{number: number for number in self.same}, **self.moved}


def match(names: Names, model: Sequence[str]) -> Match:
    """Look up a dataset's class names among the model's."""
    vocabulary, found = Vocabulary(model), Match()
    for number, name in sorted(names.items()):
        there = vocabulary(name)
        if number in there:
            found.same.append(number)
        elif len(there) == 1:
            found.moved[number] = next(iter(there))
        else:
            found.unknown.append(number)
    return found


def names_of(shards: Sequence[Shard]) -> tuple[Names, bool]:
    """Return the names of the dataset's classes, and whether these are all classes.

    Without a `classes.json` next to the shards, they are the `name`s in the json members of the first samples of some
    shards, which need not be all.

    Raises:
        UserError: a `classes.json` is damaged, or two of them give one number to different classes.
    """
    names: Names = {}
    owner: dict[int, str] = {}
    folders = list(dict.fromkeys(shard.url.rpartition("/")[0] for shard in shards))[:_FOLDERS]
    for folder in folders:
        with contextlib.suppress(OSError):
            raw = Store(folder).read(FILE)
            for number, name in ({} if raw is None else parse_names(raw, f"{folder}/{FILE}")).items():
                first = owner.setdefault(number, folder)
                if names.setdefault(number, name) != name:
                    raise UserError(
                        f"class {number} is {names[number]!r} in {first}/{FILE} and {name!r} in {folder}/{FILE}; pack "
                        f"one of them again with `saltern pack --classes {first}/{FILE}`"
                    )
    return (names, True) if names else (_peek(shards), False)


def _peek(shards: Sequence[Shard]) -> Names:
    count, samples = _PEEKED
    names: Names = {}
    for shard in shards[:: max(1, len(shards) // count)][:count]:
        with contextlib.suppress(OSError, ShardError):  # the run reports a shard that cannot be read
            for sample in islice(read_samples(shard), samples):
                name = extra(sample).get("name")
                if sample.label is not None and isinstance(name, str):
                    names.setdefault(sample.label, name)
    return names


def read_names(path: str) -> Names:
    """Return the class names in a file. Raises UserError if it cannot be read or is of no known form."""
    try:
        return parse_names(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def parse_names(raw: bytes, where: str) -> Names:
    """Parse class names: JSON (a list, or an object by number), or text with a name a line; numbers count from 0."""
    try:
        text = raw.decode("utf-8-sig")
        content = json.loads(text) if text.lstrip()[:1] in ("{", "[") else text.split("\n")
        if isinstance(content, list):
            content = {number: name.strip() if name else "" for number, name in enumerate(content)}
        names = {int(number): name for number, name in content.items() if name}
        if names and all(isinstance(name, str) for name in names.values()) and min(names) >= 0:
            return names
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UserError(
        f'{where} holds no class names: give JSON as {{"0": "cat", "1": "dog"}} or ["cat", "dog"], or a name a line'
    )


def brief_names(numbers: Sequence[int], names: Mapping[int, str], shown: int = 3) -> str:
    """Return the first classes of a list for a message, as `0 'cat', 1 'dog' and 7 more`."""
    more = f" and {len(numbers) - shown} more" * (len(numbers) > shown)
    return ", ".join(f"{number} {names[number]!r}" for number in numbers[:shown]) + more
