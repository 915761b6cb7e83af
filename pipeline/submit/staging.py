"""What travels with a submitted job: our package, the small files its words name, and the user's own module.

The job runs in a folder of its own on another machine. A file that its words name travels when small (`--config`,
`@list.txt`); any other path must be reachable from the cluster, so a relative one is made absolute here.
"""

import hashlib
import json
import os
import shlex
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from saltern.schemas.errors import UserError

SMALL = 1_000_000  # bytes that one named file, or the user's package, may weigh
INPUTS = "_inputs"  # where staged files stand in the job's folder
_PATHS = ("out", "boxes", "val", "checkpoint")  # options that hold a path; every positional word is one
_OURSELVES = Path(__file__).parents[2]  # the package `saltern`, its links followed
_UNWANTED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "tests")


class Word(NamedTuple):
    """One parsed argument of the command."""

    name: str  # the parameter's: out, shards
    flag: str | None  # as typed in full: --out; None for a positional word
    value: str | None  # None for a switch


@dataclass(frozen=True)
class Job:
    """A command as the cluster runs it, inside its staged folder."""

    command: str  # extract; with its sub-command: bench extract
    args: list[str]
    out: str | None
    fingerprint: str  # over command, args and the user's staged files; the run's own stands in its run.json
    absolute: list[str] = field(default_factory=list)  # relative paths that were made so

    @property
    def entrypoint(self) -> str:
        """For a shell on the head, whose PATH decides which `python` this is."""
        return shlex.join(["python", "-m", "saltern", *self.command.split(), *self.args])


def stage(command: str, words: Sequence[Word], folder: Path, cwd: Path) -> Job:
    """Fill `folder` with what the job needs, and nothing else.

    Raises UserError on a missing or large file, and on a config that names a relative path.
    """
    shutil.copytree(_OURSELVES, folder / "saltern", ignore=_UNWANTED)
    _name_version(folder)
    ours = set(folder.iterdir())
    staging = _Staging(folder, cwd)
    words = [staging.word(word) for word in words]
    args = [part for word in words for part in _parts(word)]
    out = next((word.value for word in words if word.name == "out"), None)
    users = sorted(set(folder.iterdir()) - ours)
    return Job(command, args, out, _fingerprint([command, *args], users), staging.absolute)


def _name_version(folder: Path) -> None:
    """The version that travels, where `importlib.metadata` looks before any saltern that is installed there."""
    made = version("saltern")
    info = folder / f"saltern-{made}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: saltern\nVersion: {made}\n")


class _Staging:
    """Copies what a word names, and says how the word reads in the job's folder."""

    def __init__(self, folder: Path, cwd: Path):
        self.folder, self.cwd = folder, cwd
        self.absolute: list[str] = []

    def word(self, word: Word) -> Word:
        if word.value is None:
            return word
        rule = self._rules().get(word.name, self._path if word.flag is None else None)
        return word._replace(value=rule(word.value)) if rule else word

    def _rules(self) -> dict[str, Callable[[str], str]]:
        return {
            **dict.fromkeys(_PATHS, self._path),
            "config": self._config,
            "weights": self._weights,
            "classes": self._classes,
            "model": self._module,
            "method": self._module,
        }

    def _path(self, value: str) -> str:
        if value.startswith("@"):
            return "@" + self._list(value[1:])
        if "://" in value or os.path.isabs(value):
            return value
        self.absolute.append(self._absolute(value))
        return self.absolute[-1]

    def _absolute(self, value: str) -> str:
        return value if "://" in value else os.path.normpath(self.cwd / value)

    def _weights(self, value: str) -> str:
        """DEFAULT, none and torchvision's names stay; a file becomes absolute."""
        return self._path(value) if os.sep in value or (self.cwd / value).exists() else value

    def _classes(self, value: str) -> str:
        """Numbers stay; a file of them travels."""
        return value if set(value) <= set("0123456789, ") else self._add(value, self._read(value))

    def _list(self, value: str) -> str:
        """A list of shards, one a line; its relative lines become absolute, as they are read relative to `cwd`."""
        lines = self._read(value).decode().splitlines()
        wanted = [self._absolute(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        return self._add(value, "".join(f"{line}\n" for line in wanted).encode())

    def _config(self, value: str) -> str:
        raw = self._read(value)
        try:
            table = tomllib.loads(raw.decode())
        except ValueError as error:
            raise UserError(f"{value} is no TOML: {error}") from error
        for key, entry in _flat(table):
            if key in ("model", "method"):
                self._module(entry)
            elif (key in (*_PATHS, "shards") and self._path(entry) != entry) or (
                key == "weights" and self._weights(entry) != entry
            ):
                fix = "make it absolute, or give it on the command line"
                raise UserError(f"{value}: {key} = {entry!r} is relative, and the job runs in another folder; {fix}")
        return self._add(value, raw)

    def _module(self, value: str) -> str:
        """`package.module:name`: a module or package of that name in `cwd` travels; others are installed there."""
        top = value.partition(":")[0].partition(".")[0]
        if ":" not in value or not top.isidentifier() or top == "saltern" or (self.folder / top).exists():
            return value
        package, module = self.cwd / top, self.cwd / f"{top}.py"
        if package.is_dir():
            shutil.copytree(package, self.folder / top, ignore=_UNWANTED)
            _weigh(value, sum(path.stat().st_size for path in (self.folder / top).rglob("*")))
        elif module.is_file():
            (self.folder / module.name).write_bytes(self._read(module.name))
        return value

    def _read(self, value: str) -> bytes:
        path = self.cwd / value
        if not path.is_file():
            raise UserError(f"there is no file {value} here to send with the job")
        _weigh(value, path.stat().st_size)
        return path.read_bytes()

    def _add(self, value: str, raw: bytes) -> str:
        """Two files of one name keep apart by their number."""
        inputs = self.folder / INPUTS
        inputs.mkdir(exist_ok=True)
        name = f"{len(list(inputs.iterdir()))}-{Path(value).name}"
        (inputs / name).write_bytes(raw)
        return f"{INPUTS}/{name}"


def _parts(word: Word) -> list[str]:
    """A value that begins with a dash stays a value when it is tied to its flag."""
    if word.flag is None:
        return [word.value or ""]
    if word.value is None:
        return [word.flag]
    if not word.flag.startswith("--"):
        return [word.flag, word.value]
    return [f"{word.flag}={word.value}"] if word.value.startswith("-") else [word.flag, word.value]


def _flat(table: dict[str, Any]) -> list[tuple[str, str]]:
    """The strings of a config, those in lists one by one."""
    pairs = [(key, entry) for key, value in table.items() for entry in (value if isinstance(value, list) else [value])]
    return [(key, entry) for key, entry in pairs if isinstance(entry, str)]


def _weigh(name: str, size: int) -> None:
    if size > SMALL:
        fix = "put it where the cluster can read it and name its absolute path or URL"
        raise UserError(f"{name} weighs {size / 1e6:.1f} MB, and {SMALL / 1e6:.0f} MB may travel with a job: {fix}")


def _fingerprint(words: list[str], users: list[Path]) -> str:
    """16 hex digits over the words and the user's staged files, so that an edited config is another job."""
    files = [path for user in users for path in sorted([user, *user.rglob("*")]) if path.is_file()]
    digests = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return hashlib.sha256(json.dumps([words, digests]).encode()).hexdigest()[:16]
