"""Decide what the numbers in `cls` mean: the model's classes as they are, or by a table from one to the other."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saltern.pipeline.shards.classes import Match, Names, Vocabulary, brief_names, match, names_of
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard

AUTO, AS_IS = "auto", "as-is"
Numbers = dict[int, int] | None  # the model's class for each number in `cls`; None: the same numbers


def choose_labels(
    option: str, shards: Sequence[Shard], model: Sequence[str] | None, classes: int, *, needed: bool, fix: str = ""
) -> tuple[Numbers, list[str]]:
    """Return the model's class for each number in `cls`, and hints for the user.

    Args:
        option: as-is | auto, which compares the names of the dataset's classes with the model's | a JSON file, an
            object from the dataset's numbers or names to the model's.
        model: the names of its classes; None if they are unknown.
        classes: of the model.
        needed: the job uses the labels, so that labels with other names than the model's are refused.
        fix: of the job, which the refusal names first.

    Raises:
        UserError: the names differ and cannot be matched, or the file is damaged or names an unknown class.
    """
    if option == AS_IS:
        return None, []
    names, complete = names_of(shards)
    if option != AUTO:
        return _read(option, names, model, classes), []
    if not names or model is None:
        return None, []
    found = match(names, model)
    if found.agrees:
        return None, []
    if complete and not found.unknown:
        said = f"labels: {len(names)} classes got the model's numbers by their names"
        return found.numbers, [f"{said} ({', '.join(_arrows(found, names, model))})"]
    problem = _differ(found, names, model)
    if needed:
        raise UserError(
            f"{problem}; {fix}give the model's class of each with --labels FILE, or keep the numbers with "
            f"--labels as-is{_pack_hint(found, complete)}"
        )
    return None, [f"{problem}; labels are kept as they are"]


def numbers_in_order(shards: Sequence[Shard]) -> Numbers:
    """Return the model's class for each number in `cls`, of a model whose classes are the dataset's names in order."""
    numbers = {number: there for there, number in enumerate(sorted(names_of(shards)[0]))}
    return None if all(number == there for number, there in numbers.items()) else numbers


def _arrows(found: Match, names: Names, model: Sequence[str], shown: int = 3) -> list[str]:
    pairs = list(found.numbers.items())
    lines = [f"{given} {names[given]!r} is {there} {model[there]!r}" for given, there in pairs[:shown]]
    return lines + ["..."] * (len(pairs) > shown)


def _differ(found: Match, names: Names, model: Sequence[str]) -> str:
    other = [*found.unknown, *found.moved]
    first = other[0]
    there = f"the model's class {first} is {model[first]!r}" if first < len(model) else f"the model has {len(model)}"
    return f"the labels are not the model's class numbers: class {brief_names(other, names)} in the shards, but {there}"


def _pack_hint(found: Match, complete: bool) -> str:
    return "" if complete or found.unknown else "; `saltern pack --classes` packs images with the model's numbers"


def _read(path: str, names: Names, model: Sequence[str] | None, classes: int) -> Numbers:
    """Return the table in a file."""
    try:
        table = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--labels {path} is none of auto, as-is, a JSON file ({error})") from error
    if not isinstance(table, Mapping) or not table:
        raise UserError(
            f'--labels {path}: give an object from the dataset\'s classes to the model\'s, as {{"0": 281, "dog": 207}}'
        )
    given = Vocabulary([names.get(number, "") for number in range(max(names, default=-1) + 1)])
    there = Vocabulary(model or ())
    return {_number(path, key, given, None): _number(path, value, there, classes) for key, value in table.items()}


def _number(path: str, word: Any, names: Vocabulary, classes: int | None) -> int:
    """Return the number of a class that the file gives by number or name; of a model with `classes`."""
    whose = "the dataset" if classes is None else "the model"
    if isinstance(word, str) and not word.isdecimal():
        found = names(word)
        if len(found) == 1:
            return next(iter(found))
        raise UserError(f"--labels {path}: {whose} has {len(found) or 'no'} classes named {word!r}; give its number")
    if isinstance(word, bool) or not isinstance(word, int | str):
        raise UserError(f"--labels {path}: {word!r} is neither the number nor the name of a class")
    number = int(word)
    if number < 0 or (classes is not None and number >= classes):
        raise UserError(f"--labels {path}: class {number} is outside of {whose}'s 0..{(classes or 0) - 1}")
    return number
