"""Decide the classes of a model that compares images with texts: the prompts given, or the dataset's class names."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saltern.pipeline.models.classifiers import needs_prompts
from saltern.pipeline.shards.classes import FILE, names_of
from saltern.schemas.errors import UserError
from saltern.schemas.prompts import PLACE, Prompts
from saltern.schemas.run import Shard
from saltern.schemas.text import counted

PHOTO = "a photo of a {}."  # template of the dataset's class names (Radford 2021, section 3.1.4)
_TABLES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".toml", ".yaml", ".yml", ".md", ".parquet", ".xlsx")

Words = list[tuple[str, list[str]]]  # name of each class, and what is put into the templates


def choose_prompts(
    option: str | Sequence[str] | None, templates: str | Sequence[str], shards: Sequence[Shard], model: str
) -> tuple[Prompts | None, bool, list[str]]:
    """Return the prompts of a request, whether they are the dataset's class names, and hints for the user.

    Raises:
        UserError: see `given_prompts` and `prompts_of_dataset`.
    """
    prompts, own_names = given_prompts(option, templates), False
    hints: list[str] = []
    if prompts is None and needs_prompts(model):
        prompts, hints = prompts_of_dataset(shards, templates, model)
        own_names = True
    if prompts is None and templates:
        raise UserError(f"--template needs --prompts and a model of images and texts: give --prompts if {model} is one")
    if prompts is not None and len(prompts.names) == 1:
        hints = [*hints, "prompts: one class, whose score is 1 for every image; give others to compare it with"]
    return prompts, own_names, hints


def given_prompts(option: str | Sequence[str] | None, templates: str | Sequence[str]) -> Prompts | None:
    """Return the prompts that the user gave; None if the option was left out.

    Args:
        option: a list of prompts, prompts with commas between them, or a file: a prompt a line, or JSON, a list or an
            object from the name of each class to its prompt or prompts.
        templates: texts with {} for a prompt, or files of them, one a line; none = each prompt as it is.

    Raises:
        UserError: a file cannot be read or has another form, a name is empty or given twice, or a template has no {}.
    """
    chosen = tuple(_templates(templates))
    if option is None:
        return None
    if isinstance(option, str) and _is_file(option):
        classes = _read(option)
    else:
        classes = [
            (word.strip(), [word.strip()]) for word in (option.split(",") if isinstance(option, str) else option)
        ]
    if not classes or any(not words or not all(word.strip() for word in (name, *words)) for name, words in classes):
        raise UserError(f"--prompts {option}: a prompt is empty; give texts with one comma between them, or a file")
    if twice := _repeated([name for name, _ in classes]):
        raise UserError(f"--prompts {option}: {twice[0]!r} is given twice; a class has one name")
    return _prompts(classes, chosen or (PLACE,))


def prompts_of_dataset(
    shards: Sequence[Shard], templates: str | Sequence[str], model: str
) -> tuple[Prompts, list[str]]:
    """Return the names of the dataset's classes as prompts, in the order of their numbers, and hints for the user.

    Raises:
        UserError: the dataset has no names, or a template has no {}.
    """
    names, complete = names_of(shards)
    if not names:
        raise UserError(
            f"{model} has no classes, and the shards have no class names: give --prompts 'a photo of a dog,...' or FILE"
        )
    chosen = tuple(_templates(templates)) or (PHOTO,)
    prompts = _prompts([(names[number], [names[number].replace("_", " ")]) for number in sorted(names)], chosen)
    where = (
        "the class names of the dataset" if complete else "the class names in the first samples, which may lack some"
    )
    said = [f"prompts: {counted(len(names), 'class', 'classes')} by {where}, as {prompts.texts()[0][0]!r}"]
    if twice := _repeated(prompts.names):
        said.append(
            f"prompts: several classes have the name {twice[0]!r}{' (and others theirs)' * (len(twice) > 1)}, so that "
            "their scores are equal; give --prompts FILE with a name and a text for each"
        )
    return prompts, said


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _prompts(classes: Words, templates: tuple[str, ...]) -> Prompts:
    return Prompts(tuple(name for name, _ in classes), tuple(tuple(words) for _, words in classes), templates)


def _is_file(option: str) -> bool:
    """Return whether the option names a file, which need not exist: a text that looks like a path is no prompt."""
    if "," in option:
        return option.endswith((".txt", ".json"))
    return os.path.isfile(option) or option.lower().endswith(_TABLES) or ("/" in option and " " not in option)


def _read(path: str) -> Words:
    """Return the classes in a file."""
    text = _text("--prompts", path)
    if text.lstrip()[:1] not in ("{", "["):
        return [(line.strip(), [line.strip()]) for line in text.split("\n") if line.strip()]
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _object(path, pairs))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path} is no JSON ({error})") from error
    if isinstance(content, dict) and Path(path).name == FILE and all(map(str.isdecimal, content)):
        raise UserError(
            f"--prompts {path} goes from numbers to names: leave --prompts out for the class names of the dataset, or "
            'give a list of names, as ["dog", "cat"]'
        )
    items = list(content.items()) if isinstance(content, dict) else [(name, name) for name in content]
    found = [(name, [words] if isinstance(words, str) else words) for name, words in items]
    for name, words in found:
        if not isinstance(name, str) or not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(
                f'--prompts {path}: give {{"dog": "a photo of a dog", "cat": ["a cat", "a kitten"]}} or '
                f'["dog", "cat"], and not {words!s:.40}'
            )
    return found


def _object(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises UserError if a name is there twice, of which json would take the last."""
    if twice := _repeated([name for name, _ in pairs]):
        raise UserError(f"--prompts {path}: {twice[0]!r} is given twice; a class has one name")
    return dict(pairs)


def _templates(given: str | Sequence[str]) -> list[str]:
    """Return the templates, with files of them replaced by their lines."""
    found: list[str] = []
    for word in [given] if isinstance(given, str) else given:
        lines, absent = [word], ", and is no file"
        if PLACE not in word and os.path.isfile(word):
            lines, absent = [line for line in _text("--template", word).split("\n") if line.strip()], f" ({word})"
        if not lines:
            raise UserError(f"--template {word} has no lines; write a template a line, as 'a photo of a {{}}.'")
        for line in lines:
            if PLACE not in line:
                raise UserError(
                    f"--template {line!r} has no {{}} for the name of a class, as in 'a photo of a {{}}.'{absent}"
                )
        found += lines
    return found


def _text(option: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} cannot be read ({error})") from error
