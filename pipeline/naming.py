"""Things by name: an object by `package.module:name`; and what an error says of a wrong one."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from saltern.schemas.errors import UserError


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'? ` with the choice nearest to name, or an empty string where none is near."""
    near = difflib.get_close_matches(name, list(choices), 1, 0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def brief(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_object(spec: str) -> Any:
    """What `package.module:name` names. Raises UserError where the module or the name in it is not found."""
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"cannot import {module_name!r} for {spec!r} ({brief(error)}); run from its folder or install it"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        hint = nearest(name, vars(module))
        raise UserError(f"module {module_name!r} has no {name!r}; {hint}give it as package.module:name") from None
