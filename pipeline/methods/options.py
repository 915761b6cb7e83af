"""The options of a method: what its class declares, and values checked against it."""

import json
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from saltern.schemas.errors import UserError
from saltern.schemas.run import check_keys


def declared(kind: type, base: type) -> dict[str, Any]:
    """Type hints of the options that `kind` and its parents below `base` declare, by name.

    An option is a public class attribute with a type and a default: `steps: int = 32`.
    """
    inherited = get_type_hints(base)
    return {
        name: hint
        for name, hint in get_type_hints(kind).items()
        if name not in inherited
        and not name.startswith("_")
        and hint is not ClassVar
        and get_origin(hint) is not ClassVar
        and hasattr(kind, name)
    }


def complete(
    given: Mapping[str, Any], hints: Mapping[str, Any], defaults: Mapping[str, Any], of: str
) -> dict[str, Any]:
    """All options, the defaults filled in. Strings stand for other types as JSON does (`-O steps=8`).

    Raises:
        UserError: an unknown name, or a value that its type does not allow.
    """
    check_keys(given, hints, f"the options of {of}")
    return {
        **defaults,
        **{name: _checked(value, hints[name], f"option {name} of {of}") for name, value in given.items()},
    }


def from_text(value: Any) -> Any:
    """A string as the JSON value that it spells, or as itself; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _checked(value: Any, hint: Any, what: str) -> Any:
    value = list(value) if isinstance(value, tuple) else value
    for candidate in (value, from_text(value)):
        if _fits(candidate, hint):
            return float(candidate) if hint is float else candidate
    if get_origin(hint) is Literal:
        raise UserError(f"{what} is one of {', '.join(map(str, get_args(hint)))}, not {value!r}")
    raise UserError(f"{what} is of type {getattr(hint, '__name__', hint)}, not {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(part, args[0]) for part in value)
    if hint in (int, float):  # True is an int to Python, and no number to a user
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)
