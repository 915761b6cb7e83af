"""Options that several commands share, and the files and words that they are read from."""

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saltern.schemas.errors import UserError
from saltern.schemas.run import check_keys

if TYPE_CHECKING:
    from saltern.pipeline.engine.conduct import Job

Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS...",
        help="Paths or s3://, gs:// URLs of WebDataset tars: braces, globs, a folder, @list.txt.",
        show_default=False,
    ),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of a run.", show_default=False)]
Model = Annotated[
    str, typer.Option(help="torchvision name, efficientnet_lite0|1|2, timm:NAME or package.module:factory.")
]
Weights = Annotated[str, typer.Option(help="DEFAULT, none (random from --seed), a weights name, or a file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the keys of a TOML file the defaults of the command. Raises UserError on an unknown key."""
    if path is None:
        return None
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from error
    names = {_key(parameter): parameter.name for parameter in ctx.command.params if parameter.name != "config"}
    given = {key.replace("_", "-"): value for key, value in given.items()}
    check_keys(given, names, str(path))
    table = given.get("options", {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: options must be a table, as [options] and then key = value lines")
    defaults = {names[key]: _as_words(value) for key, value in given.items() if key != "options"}
    if table:
        defaults[names["options"]] = [f"{key}={json.dumps(value)}" for key, value in table.items()]
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _key(parameter: Any) -> str:
    """The parameter's name as on the command line, without dashes; the options of the method are a table."""
    long = [name for name in parameter.opts if name.startswith("--")]
    name = long[0][2:] if long else parameter.name
    return "options" if name == "option" else str(name)


def _as_words(value: Any) -> Any:
    """Mean and std are written as numbers in TOML and as words on the command line."""
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return ",".join(map(str, value))
    return value


def parse_options(words: list[str]) -> dict[str, Any]:
    """`key=value` words; a value is JSON where it parses as such, numbers with commas are a list, else text."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"-O {word!r} is not key=value")
        found[key.replace("-", "_")] = _value(value)
    return found


def _value(text: str) -> Any:
    for candidate in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return text


def parse_floats(text: str | None, name: str) -> list[float] | None:
    """`R,G,B` as three numbers."""
    if text is None:
        return None
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise UserError(f"{name} {text!r}: three numbers are needed, as 0.485,0.456,0.406")
    return numbers


Engine = Annotated[str, typer.Option(help="local (this process), ray (actors) or auto.")]


Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: $RAY_ADDRESS, or one of our own.")]


Workers = Annotated[int | None, typer.Option(min=1, help="Ray actors; default: one for each GPU.")]


GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="GPUs of an actor; fractions allowed; default: 1, on a CPU 0.")
]


Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that stands there first.")]


ShardTimeout = Annotated[float | None, typer.Option(min=0, help="Seconds a shard may take.")]


MaxFailedShards = Annotated[int | None, typer.Option(min=0, help="Stop when more have failed.")]


def drive(job: "Job", **settings: Any) -> None:
    """Do the job and leave with its exit code."""
    from saltern.pipeline.engine.conduct import RunOptions, conduct

    ended = conduct(job, RunOptions(**settings))
    sys.stdout.flush()
    sys.stderr.flush()
    if ended.stuck:
        os._exit(ended.code)  # a thread is stuck in a shard: an ordinary exit would wait for it
    raise typer.Exit(ended.code)
