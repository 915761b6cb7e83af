"""Options of a method: their declaration in its class, and the check of given values."""

import json
import types
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from saltern.schemas.config import check_keys
from saltern.schemas.errors import UserError

_type_hints = cache(get_type_hints)  # evaluates each annotation again


class OptionSpec(NamedTuple):
    """Description of one option."""

    name: str
    default: Any
    values: tuple[Any, ...] | str  # the choices, or the type as text: "int", "list[int] | None"
    help: str


def specs(kind: type, base: type) -> list[OptionSpec]:
    """Return the options that `kind` and its parents below `base` declare, in the order of declaration."""
    described = _type_hints(kind, include_extras=True)
    return [
        OptionSpec(name, getattr(kind, name), _values(hint), getattr(described[name], "__metadata__", ("",))[0])
        for name, hint in declared(kind, base).items()
    ]


def declared(kind: type, base: type) -> dict[str, Any]:
    """Return the type of each option that `kind` and its parents below `base` declare, by name.

    An option is a public class attribute with a type and a default: `steps: int = 32`. Annotated adds its help:
    `steps: Annotated[int, "Points on the path."] = 32`.
    """
    inherited = _type_hints(base)
    return {
        name: hint
        for name, hint in _type_hints(kind).items()
        if name not in inherited
        and not name.startswith("_")
        and hint is not ClassVar
        and get_origin(hint) is not ClassVar
        and hasattr(kind, name)
    }


def complete(
    given: Mapping[str, Any], hints: Mapping[str, Any], defaults: Mapping[str, Any], method: str
) -> dict[str, Any]:
    """Return all options: the given values, checked, and the other defaults. Text is read as JSON (`-O steps=8`).

    Raises:
        UserError: an unknown name, or a value that its type does not allow.
    """
    check_names(given, hints, method)
    checked = {name: _checked(value, hints[name], f"option {name} of {method}") for name, value in given.items()}
    return {**defaults, **checked}


def check_names(given: Iterable[str], known: Iterable[str], methods: str) -> None:
    """Raise UserError on the first option that these methods do not have."""
    known = list(known)
    if "checkpoint" in given and "checkpoint" not in known:
        raise UserError(f"{methods}: no checkpoint is taken; --checkpoint is of casm and localizer")
    check_keys(given, known, f"the options of {methods}")


def from_text(value: Any) -> Any:
    """Return the JSON value that a text spells, or else the value unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _checked(value: Any, hint: Any, option: str) -> Any:
    value = list(value) if isinstance(value, tuple) else value
    for candidate in (value, from_text(value)):
        if _fits(candidate, hint):
            return float(candidate) if hint is float else candidate
    values = _values(hint)
    allowed = f"of type {values}" if isinstance(values, str) else f"one of {', '.join(map(str, values))}"
    raise UserError(f"{option} must be {allowed}, not {value!r}")


def _values(hint: Any) -> tuple[Any, ...] | str:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(part, args[0]) for part in value)
    if hint in (int, float):  # Python counts True as an int
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)
