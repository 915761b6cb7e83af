"""Stage the folder that Ray sends to the cluster: Saltern's code, small input files and the user's own module.

The job runs in a copy of this folder on another machine. Small files named on the command line travel with it
(`--config`, `@list.txt`); the cluster must be able to read every other path, so relative paths are made absolute.
"""

import hashlib
import json
import os
import shlex
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from saltern.pipeline.naming import located
from saltern.pipeline.storage.filesystem import check_url
from saltern.schemas.errors import UserError

MAX_BYTES = 1_000_000  # of one input file, or of the user's package
INPUTS = "_inputs"  # folder of the input files in the staged folder
_PATHS = ("out", "boxes", "val", "checkpoint")  # options that hold a path; so does every positional argument
_FILES = ("prompts", "templates", "labels")  # options that may name a file
_LIBRARIES = ("saltern", "timm", "open_clip", "hf", "captum")  # before a colon; a folder here of such a name is another
_PACKAGE = Path(__file__).parents[2]  # saltern/, its links followed
_UNWANTED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "tests")


class Word(NamedTuple):
    """One parsed argument of the command."""

    name: str  # of its parameter: out, shards
    flag: str | None  # its long form: --out; None for a positional argument
    value: str | None  # None for a switch


@dataclass(frozen=True)
class Submission:
    """A command as the cluster runs it, in its staged folder."""

    command: str  # extract; with a subcommand: bench extract
    args: list[str]
    out: str | None
    fingerprint: str  # of command, args and the user's staged files; run.json holds the fingerprint of the run
    absolute: list[str]  # relative paths that were made absolute

    @property
    def entrypoint(self) -> str:
        """The shell command; the PATH on the head decides which `python` it starts."""
        return shlex.join(["python", "-m", "saltern", *self.command.split(), *self.args])


def stage(command: str, words: Sequence[Word], folder: Path, cwd: Path) -> Submission:
    """Fill the empty `folder` with everything that the job needs.

    Args:
        cwd: the folder that relative paths start from.

    Raises:
        UserError: a file is missing or too large, or a config names a relative path.
    """
    staging = _Staging(folder, cwd)
    words = [word._replace(value=staging.translate(word)) for word in words]
    args = [_spell(word) for word in words]
    out = next((word.value for word in words if word.name == "out"), None)
    fingerprint = _fingerprint([command, *args], folder)
    shutil.copytree(_PACKAGE, folder / "saltern", ignore=_UNWANTED)
    return Submission(command, args, out, fingerprint, staging.absolute)


class _Staging:
    """A copier of the files that arguments name, and translator of the arguments for the job's folder."""

    def __init__(self, folder: Path, cwd: Path):
        self.folder, self.cwd = folder, cwd
        self.absolute: list[str] = []

    def translate(self, word: Word) -> str | None:
        """Return the argument's value as the job must read it."""
        name, value = word.name, word.value
        if value is None:
            return None
        if name == "config":
            return self._add_config(value)
        if name == "classes":  # numbers, or a file of numbers
            return value if set(value) <= set("0123456789, ") else self._add(value, self._read(value))
        if name in _FILES and os.path.isfile(self.cwd / value):
            return self._add(value, self._read(value))
        if name in ("model", "method"):
            self._add_module(value)
            return self._locate(value)
        if name == "classifiers":
            return ",".join(self._add_classifier(part.strip()) for part in value.split(","))
        if name == "weights" and os.sep not in value and not (self.cwd / value).exists():
            return value  # DEFAULT, none or a name of torchvision
        if word.flag is not None and name not in (*_PATHS, "weights"):
            return value
        return self._add_list(value) if value.startswith("@") else self._make_absolute(value)

    def _locate(self, model: str) -> str:
        found = located(model, self.cwd)
        if found != model:
            self.absolute.append(found)
        return found

    def _add_classifier(self, word: str) -> str:
        """Translate MODEL or MODEL=WEIGHTS, each as the option of its name."""
        model, equals, weights = word.partition("=")
        found = self.translate(Word("model", "--model", model)) or ""
        return found + equals + (self.translate(Word("weights", "--weights", weights)) or "") if weights else found

    def _make_absolute(self, path: str) -> str:
        check_url(path)
        if "://" in path or os.path.isabs(path):
            return path
        self.absolute.append(os.path.normpath(self.cwd / path))
        return self.absolute[-1]

    def _add_list(self, value: str) -> str:
        """Copy a list of shards, one per line; relative lines start from `cwd`, so they are made absolute."""
        lines = [line.strip() for line in self._read(value[1:]).decode().splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        for line in lines:
            check_url(line)
        paths = [line if "://" in line else os.path.normpath(self.cwd / line) for line in lines]
        return "@" + self._add(value[1:], "".join(f"{path}\n" for path in paths).encode())

    def _add_config(self, path: str) -> str:
        """Copy a config unchanged, and the module that it names. Raises UserError if it names a relative path."""
        raw = self._read(path)
        try:
            table = tomllib.loads(raw.decode())
        except ValueError as error:
            raise UserError(f"{path} is not valid TOML: {error}") from error
        for key, values in table.items():
            for value in values if isinstance(values, list) else [values]:
                if key == "config" or not isinstance(value, str):
                    continue
                flag = None if key == "shards" else f"--{key}"
                if self.translate(Word(key, flag, value)) != value:
                    raise UserError(
                        f"{path}: {key} = {value!r} is relative, but the job runs in another folder; "
                        "make it absolute, or give it on the command line"
                    )
        return self._add(path, raw)

    def _add_module(self, spec: str) -> None:
        """Copy the module of `package.module:name` from `cwd`; if it is not there, the cluster must have it."""
        top = spec.partition(":")[0].partition(".")[0]
        if ":" not in spec or not top.isidentifier() or top in _LIBRARIES:
            return
        package, module = self.cwd / top, self.cwd / f"{top}.py"
        if package.is_dir():
            shutil.copytree(package, self.folder / top, ignore=_UNWANTED, dirs_exist_ok=True)
            _check_size(spec, sum(path.stat().st_size for path in (self.folder / top).rglob("*")))
        elif module.is_file():
            (self.folder / module.name).write_bytes(self._read(module.name))

    def _read(self, path: str) -> bytes:
        file = self.cwd / path
        if not file.is_file():
            raise UserError(f"there is no file {path} here to send with the job")
        _check_size(path, file.stat().st_size)
        return file.read_bytes()

    def _add(self, path: str, raw: bytes) -> str:
        """Write an input file, numbered because two inputs may have the same name; return its path in the job."""
        inputs = self.folder / INPUTS
        inputs.mkdir(exist_ok=True)
        name = f"{len(list(inputs.iterdir()))}-{Path(path).name}"
        (inputs / name).write_bytes(raw)
        return f"{INPUTS}/{name}"


def _spell(word: Word) -> str:
    """Return the argument as one word: with `=`, a value may begin with a dash."""
    return "=".join(part for part in (word.flag, word.value) if part is not None)


def _check_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise UserError(
            f"{name} has {size / 1e6:.1f} MB, and at most {MAX_BYTES / 1e6:.0f} MB can travel with a job: "
            "put it where the cluster can read it and give its absolute path or URL"
        )


def _fingerprint(words: list[str], folder: Path) -> str:
    """Return 16 hex digits of the command and the user's files, so that an edited config is another job."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = [[str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return hashlib.sha256(json.dumps([words, digests]).encode()).hexdigest()[:16]
