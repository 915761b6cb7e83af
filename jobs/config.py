"""Build the config of a job from the command's options and from a --config file."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from fractions import Fraction
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import typer

from saltern.schemas.config import check_keys
from saltern.schemas.errors import UserError

if TYPE_CHECKING:
    from saltern.pipeline.engine.conduct import Job, Jobs, RunResult

T = TypeVar("T")


def collect(kind: type[T], ctx: typer.Context, **more: Any) -> T:
    """Build a config dataclass from the command's parameters of the same names.

    Args:
        kind: the dataclass.
        ctx: the command's context.
        more: fields that differ from the parameters; they take precedence.
    """
    return kind(**{**_parameters(kind, ctx), **more})


def given(kind: type[T], ctx: typer.Context) -> dict[str, Any]:
    """Return the fields of a config dataclass that the user gave, on the command line or in a --config file."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    left_out = {name for name, source in sources.items() if source is None or source.name == "DEFAULT"}
    return {name: value for name, value in _parameters(kind, ctx).items() if name not in left_out}


def _parameters(kind: type[T], ctx: typer.Context) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return {name: _plain(value) for name, value in ctx.params.items() if name in names}


def _plain(value: Any) -> Any:
    """Return choices and paths as the text that is stored, anything else unchanged."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, PurePath) else value


def drive(ctx: typer.Context, job: "Job | Jobs") -> None:
    """Run the job with the command's run options, and exit with its code."""
    from saltern.pipeline.engine.conduct import RunOptions, conduct

    leave(conduct(job, collect(RunOptions, ctx)))


def leave(ended: "RunResult") -> NoReturn:
    """Exit with the code of a run."""
    sys.stdout.flush()
    sys.stderr.flush()
    if ended.stuck:
        os._exit(ended.code)  # sys.exit would wait for the thread that is stuck in a shard
    raise typer.Exit(ended.code)


# --- a --config file


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the keys of a TOML file the defaults of the command. Raises UserError on an unknown key."""
    if path is None:
        return None
    import tomllib

    try:
        given = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from error
    parameters = {_key(parameter): parameter for parameter in ctx.command.params if parameter.name != "config"}
    names = {key: parameter.name for key, parameter in parameters.items()}
    given = {key.replace("_", "-"): value for key, value in given.items()}
    check_keys(given, names, str(path))
    table = given.get("options", {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: options must be a table, as [options] and then key = value lines")
    defaults = {
        names[key]: _as_text(value) if _takes_several(parameters[key]) else _joined(f"{path}: {key}", _as_text(value))
        for key, value in given.items()
        if key != "options"
    }
    if table:
        defaults[names["options"]] = [f"{key}={json.dumps(value)}" for key, value in table.items()]
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _key(parameter: Any) -> str:
    """Return an option's key in the file: its long name without dashes; `options` for the table of method options."""
    long = [name for name in parameter.opts if name.startswith("--")]
    return long[0][2:] if long and parameter.name != "options" else str(parameter.name)


def _takes_several(parameter: Any) -> bool:
    return parameter.nargs != 1 or getattr(parameter, "multiple", False)


def _joined(where: str, value: Any) -> Any:
    """Return a list of texts as the one text with commas that the command line takes."""
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return value
    if any("," in word for word in value):
        raise UserError(f"{where} = {value!r}: a text with a comma cannot be in this list; give a file in its place")
    return ",".join(value)


def _as_text(value: Any) -> Any:
    """Return numbers and lists of numbers as the text that the command line takes for them."""
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return ",".join(map(str, value))
    return str(value) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- callbacks that convert the text of an option


def parse_options(words: list[str] | None) -> dict[str, Any]:
    """Return `key=value` and `METHOD:key=value` words as a dict.

    A value is JSON if it parses as JSON, else a list of numbers, else text.
    """
    found: dict[str, Any] = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        method, colon, key = name.rpartition(":")
        if not equals or not key:
            raise UserError(f"-O {word!r} is not key=value")
        found[f"{method}{colon}{key.replace('-', '_')}"] = _json_or_text(value)
    return found


def _json_or_text(text: str) -> Any:
    for candidate in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return text


def convert(read: Callable[[str], Any], what: str) -> Callable[[typer.CallbackParam, str | None], Any]:
    """Return a callback that converts an option's text, or raises a UserError that names the expected form."""

    def callback(parameter: typer.CallbackParam, text: str | None) -> Any:
        try:
            return None if text is None else read(text)
        except (ValueError, ZeroDivisionError, OSError):
            raise UserError(f"{parameter.opts[0]} {text!r} is not {what}") from None

    return callback


def to_rgb(text: str) -> list[float]:
    red, green, blue = map(float, text.split(","))
    return [red, green, blue]


def to_number(text: str) -> float:
    above, _, below = text.partition("/")
    return float(Fraction(above) / Fraction(below or 1))


def to_lambda(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else float(text)


def to_classes(text: str) -> list[int]:
    """Return the numbers in `A,B,...` or in a file. Commas, spaces and line ends separate them."""
    listed = re.fullmatch(r"[\d\s,]+", text) is not None
    words = text if listed else Path(text).read_text("utf-8-sig")
    return [int(word.replace("_", "-")) for word in re.split(r"[\s,]+", words.strip())]  # int() takes 3_14 as 314
