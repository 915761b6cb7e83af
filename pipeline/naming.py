"""Import objects by name, and write the errors about names and missing packages."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from saltern.schemas.errors import UserError

MODULES = "SALTERN_MODULES"  # environment variable of workers: the folder where the user called Saltern


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `did you mean 'x'? ` with the choice nearest to name, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(choices), 1, 0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def install_hint(extra: str) -> str:
    """Return how to install one of Saltern's extras; no package registry has Saltern."""
    return f"in your clone of Saltern, run pip install -c constraints.txt '.[{extra}]'"


def located(name: str, start: str | os.PathLike[str] = "") -> str:
    """Return the name of a model, with a folder in it made absolute, for workers with another working folder.

    Args:
        name: as in --model; hf: and open_clip:local-dir: may name a folder, which may begin with ~.
        start: the folder that relative ones start from; "" = the working folder.
    """
    for prefix in ("hf:", "open_clip:local-dir:"):
        folder = os.path.join(start, os.path.expanduser(name.removeprefix(prefix)))
        if name.startswith(prefix) and (os.path.isdir(folder) or name.startswith(f"{prefix}~")):
            return prefix + os.path.abspath(folder)
    return name


def import_object(spec: str) -> Any:
    """Return the object that `package.module:name` names. Raises UserError if there is no such module or name.

    Only for such names, the folder where the user called Saltern is searched, after all others. A file there that is
    named like a package must not run in its place.
    """
    folder = os.environ.get(MODULES) or os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
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
