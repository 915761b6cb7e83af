"""JSON files that prove themselves: an object with a digest of its other keys, and dataclasses from checked objects."""

import hashlib
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_END = b',\n "seal": "%s"\n}'
_PLAIN = {str, int, float, bool, types.NoneType}

T = TypeVar("T")


def seal(stored: Mapping[str, Any]) -> bytes:
    """Return an object as a JSON file that ends with the key `seal`: the sha256 of all text before it."""
    body = json.dumps(stored, indent=1).encode()[:-2]  # without the line of the closing brace
    return body + _END % hashlib.sha256(body).hexdigest().encode()


def unseal(raw: bytes, *, sealed: bool) -> dict[str, Any]:
    """Return the object in a file that `seal` wrote, without the seal.

    Args:
        raw: content of the file.
        sealed: whether the seal is required; files of saltern 0.1 have none.

    Raises:
        ValueError: the file differs from what was written.
    """
    try:
        stored = json.loads(raw)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(stored, dict):
        raise ValueError("it is no JSON object")
    given = stored.pop("seal", None)
    if given is None and not sealed:
        return stored
    body = raw[: -len(_END % bytes(64))]
    if raw != body + _END % hashlib.sha256(body).hexdigest().encode():
        raise ValueError("its seal is missing" if given is None else "its seal does not fit its content")
    return stored


def build(kind: type[T], stored: Any) -> T:
    """Return a dataclass from an object of JSON.

    Raises:
        ValueError: a key is unknown or missing, or a value has another type than its field.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{kind.__name__.lower()} is no JSON object")
    checks, needed = _checks(kind)  # type: ignore[arg-type]
    if missing := needed - stored.keys():
        raise ValueError(f"the key {min(missing)!r} is missing")
    for name, value in stored.items():
        if name not in checks:
            raise ValueError(f"the key {name!r} is unknown")
        if not checks[name](value):
            raise ValueError(f"{name!r} is {value!r:.80}")
    return kind(**stored)


@cache
def _checks(kind: Any) -> tuple[dict[str, Callable[[Any], bool]], set[str]]:
    """Return a check of each field's values by name, and the names of the fields without a default."""
    hints = get_type_hints(kind)
    needed = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    return {name: _check(hint) for name, hint in hints.items()}, needed


def _check(hint: Any) -> Callable[[Any], bool]:
    """Return a function that tells whether a value of JSON has the type of a field."""
    if kinds := _plain(hint):
        return lambda value: type(value) in kinds
    if isinstance(hint, types.UnionType):
        either = [_check(one) for one in get_args(hint)]
        return lambda value: any(one(value) for one in either)
    if get_origin(hint) is dict:
        each = _plain(get_args(hint)[1])
        return lambda value: type(value) is dict and each.issuperset(map(type, value.values()))
    if get_origin(hint) is list:
        every = _check(get_args(hint)[0])
        return lambda value: type(value) is list and all(map(every, value))
    return lambda value: isinstance(value, hint)


def _plain(hint: Any) -> frozenset[type]:
    """Return the types that values of JSON have for a field of plain values, of which a float may be an int."""
    kinds = set(get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    if not kinds <= _PLAIN:
        return frozenset()
    return frozenset(kinds | {int} if float in kinds else kinds)
