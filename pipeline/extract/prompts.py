"""Decide the classes of a model that compares images with texts: the prompts given, or the dataset's class names."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from saltern.pipeline.shards.classes import names_of
from saltern.schemas.errors import UserError
from saltern.schemas.prompts import PLACE, Prompts
from saltern.schemas.run import Shard
from saltern.schemas.text import counted

PHOTO = "a photo of a {}."  # template of the dataset's class names (Radford 2021, section 3.1.4)

Words = list[tuple[str, list[str]]]  # name of each class, and what is put into the templates


def given_prompts(option: str | None, templates: Sequence[str]) -> Prompts | None:
    """Return the prompts that the user gave; None if the option was left out.

    Args:
        option: prompts with commas between them, or a file: a prompt a line, or JSON, a list or an object from the name
            of each class to its prompt or prompts.
        templates: texts with {} for a prompt, or files of them, one a line; none = each prompt as it is.

    Raises:
        UserError: a file cannot be read or has another form, a name is empty or given twice, or a template has no {}.
    """
    chosen = tuple(_templates(templates))
    if option is None:
        return None
    classes = _read(option) if _is_file(option) else [(word.strip(), [word.strip()]) for word in option.split(",")]
    if not classes or any(not name or not words or not all(words) for name, words in classes):
        raise UserError(f"--prompts {option}: a prompt is empty; give texts with one comma between them, or a file")
    if twice := [name for name, count in Counter(name for name, _ in classes).items() if count > 1]:
        raise UserError(f"--prompts {option}: {twice[0]!r} is given twice; a class has one name")
    return _prompts(classes, chosen or (PLACE,))


def prompts_of_dataset(shards: Sequence[Shard], templates: Sequence[str], model: str) -> tuple[Prompts, list[str]]:
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
    return prompts, [f"prompts: {counted(len(names), 'class', 'classes')} by {where}, as {prompts.texts()[0][0]!r}"]


def _prompts(classes: Words, templates: tuple[str, ...]) -> Prompts:
    return Prompts(tuple(name for name, _ in classes), tuple(tuple(words) for _, words in classes), templates)


def _is_file(option: str) -> bool:
    return option.endswith((".txt", ".json")) or ("," not in option and os.path.isfile(option))


def _read(path: str) -> Words:
    """Return the classes in a file."""
    text = _text("--prompts", path)
    if text.lstrip()[:1] not in ("{", "["):
        return [(line.strip(), [line.strip()]) for line in text.split("\n") if line.strip()]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path} is no JSON ({error})") from error
    if isinstance(content, dict) and all(re.fullmatch(r"\d+", key) for key in content):
        content = [content[key] for key in sorted(content, key=int)]  # a classes.json
    items = list(content.items()) if isinstance(content, dict) else [(name, name) for name in content]
    found = [(name, [words] if isinstance(words, str) else words) for name, words in items]
    for name, words in found:
        if not isinstance(name, str) or not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(
                f'--prompts {path}: give {{"dog": "a photo of a dog", "cat": ["a cat", "a kitten"]}} or '
                f'["dog", "cat"], and not {words!s:.40}'
            )
    return found


def _templates(given: Sequence[str]) -> list[str]:
    """Return the templates, with files of them replaced by their lines."""
    found: list[str] = []
    for word in given:
        is_file = PLACE not in word and os.path.isfile(word)
        found += [line for line in _text("--template", word).split("\n") if line.strip()] if is_file else [word]
    for template in found:
        if PLACE not in template:
            raise UserError(f"--template {template!r} has no {{}} for the name of a class, as in 'a photo of a {{}}.'")
    return found


def _text(option: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} cannot be read ({error})") from error
