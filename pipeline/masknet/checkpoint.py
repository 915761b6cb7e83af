"""Checkpoints of a mask network: DIR/checkpoints/<step>/, and members of its pool: DIR/pool/<step>.safetensors.

A checkpoint holds a state of tensors and JSON values, without pickles. The state has an entry `pool_manifest` with the
step and digest of each member; the members have files of their own. A checkpoint gets its name only when it is
complete, after the pool files that it names.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saltern.pipeline.masknet import trees
from saltern.pipeline.masknet.members import Member, member_file, read_member, write_member
from saltern.pipeline.naming import brief
from saltern.pipeline.storage.files import fsync
from saltern.schemas.errors import UserError

FORMAT = 1
KEPT = 2  # checkpoints; older ones are removed, with the pool files that no kept checkpoint names
_TENSORS, _REST, _UNFINISHED, _USED = "tensors.safetensors", "state.json", ".unfinished-", "used-by-a-run"


def open_checkpoint(path: Path, digest: str = "") -> "Checkpoint":
    """Return a checkpoint by its own folder, or one of the training in `path`: that of the digest, else the newest.

    Raises:
        UserError: there is none.
    """
    if (path / _REST).is_file():
        return _open(path)
    wanted = [folder for folder in _folders(path / "checkpoints") if digest and _digest(folder) == digest]
    if wanted:
        return _open(wanted[0])
    checkpoint = Checkpoints(path).newest() if path.is_dir() else None
    if checkpoint is None:
        raise UserError(f"{path} holds no checkpoint; `saltern train-casm SHARDS --out {path}` makes one")
    return checkpoint


def newer_than(path: Path, used: Path) -> Path | None:
    """Return the newest checkpoint of the training in `path` if it is newer than the used one of that training."""
    newest = next(reversed(_folders(path / "checkpoints")), None)
    same = newest is not None and newest.parent.absolute() == used.parent and newest.name != used.name
    return newest if same else None


def mark_used(folder: Path) -> None:
    """Mark a checkpoint as used by a run, so that a training that continues does not remove it."""
    with contextlib.suppress(OSError):  # a training cannot remove it from a folder that takes no files
        (folder / _USED).touch()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int  # number of steps done
    config: dict[str, Any]  # of the training, JSON
    tree: dict[str, Any]  # the state with paths in place of tensors
    digest: str  # sha256 over all of it, hex

    def part(self, name: str) -> Any:
        """Return one entry of the state with its tensors on the CPU, or None if it has no such entry."""
        if name not in self.tree:
            return None
        with safetensors.safe_open(self.folder / _TENSORS, "pt") as file:
            return trees.join(self.tree[name], file.get_tensor)

    def state(self) -> dict[str, Any]:
        """Return the whole state, with the members of the pool in the entry `pool`.

        Raises:
            UserError: a pool file is missing or not the one that was saved; the message names it.
        """
        state = {name: self.part(name) for name in self.tree}
        pool = self.folder.parent.parent / "pool"
        members = [read_member(pool / member_file(entry["step"]), entry) for entry in state["pool_manifest"]]
        state["pool"] = {"members": [{"step": member.step, "state": member.state} for member in members]}
        return state


class Checkpoints:
    """The checkpoints below a folder, and their pool files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: dict[int, str] = {}  # digests of the pool files known to be complete, by step

    def newest(self, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None if the folder has no checkpoints.

        Raises:
            UserError: none of the existing checkpoints is complete.
        """
        folders = _folders(self.root / "checkpoints")
        for folder in reversed(folders):
            try:
                return _open(folder)
            except UserError as error:
                say(f"{error}; trying an older one")
        if folders:
            raise UserError(f"none of the {len(folders)} checkpoints in {self.root / 'checkpoints'} is complete")
        return None

    def save(self, state: Mapping[str, Any], config: Mapping[str, Any], members: Sequence[Member]) -> Path:
        """Write the pool files and a checkpoint, remove old ones, and return its folder.

        Args:
            state: mappings, lists and tensors; `steps_done` names the checkpoint.
            config: of the training, JSON.
            members: those of `pool_manifest`.
        """
        for member in members:
            if self._written.get(member.step) != member.digest:
                write_member(self.root / "pool" / member_file(member.step), member)
                self._written[member.step] = member.digest
        tensors: dict[str, Tensor] = {}
        tree = {name: trees.split(value, name, tensors) for name, value in state.items()}
        folder = self.root / "checkpoints" / str(state["steps_done"])
        unfinished = folder.with_name(f"{_UNFINISHED}{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        safetensors.torch.save_file(tensors, unfinished / _TENSORS)
        rest = {"format": FORMAT, "step": state["steps_done"], "sha256": _sha256(unfinished / _TENSORS)}
        (unfinished / _REST).write_text(json.dumps({**rest, "config": config, "state": tree}))
        for path in (unfinished / _TENSORS, unfinished / _REST, unfinished):
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
        unfinished.rename(folder)
        fsync(folder.parent)
        self._clear()
        return folder

    def known(self, members: Sequence[Member]) -> None:
        """Record that these members have complete files, which are not written again."""
        self._written.update({member.step: member.digest for member in members})

    def _clear(self) -> None:
        folders = _folders(self.root / "checkpoints")
        for folder in [folder for folder in folders[:-KEPT] if not (folder / _USED).exists()]:
            folder.rename(folder.with_name(f"{_UNFINISHED}{folder.name}"))  # a kill must not leave half of one
        for unfinished in (self.root / "checkpoints").glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        named = {member_file(step) for folder in folders[-KEPT:] for step in _pool_steps(folder)}
        for file in (self.root / "pool").glob("*.safetensors"):  # other files are the user's
            if file.name not in named and file.stem.removeprefix(_UNFINISHED).isdecimal():
                file.unlink()


def _open(folder: Path) -> Checkpoint:
    try:
        raw = (folder / _REST).read_bytes()
        content = json.loads(raw)
        if content["format"] != FORMAT:
            raise UserError(f"{folder} has format {content['format']!r}; only format {FORMAT} can be read")
        complete = _sha256(folder / _TENSORS) == content["sha256"]
        digest = hashlib.sha256(raw).hexdigest()
        checkpoint = Checkpoint(folder.absolute(), content["step"], content["config"], content["state"], digest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the checkpoint {folder} is damaged ({brief(error)})") from error
    if not complete:
        raise UserError(f"the checkpoint {folder} is damaged ({_TENSORS} has changed since it was written)")
    return checkpoint


def _digest(folder: Path) -> str:
    """Return the digest of a checkpoint; "" if it is incomplete."""
    try:
        return hashlib.sha256((folder / _REST).read_bytes()).hexdigest()
    except OSError:
        return ""


def _folders(parent: Path) -> list[Path]:
    """Return the folders of checkpoints by step, complete or not."""
    folders = [path for path in parent.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def _pool_steps(folder: Path) -> list[int]:
    try:
        manifest = json.loads((folder / _REST).read_bytes())["state"]["pool_manifest"]
        return [entry["step"] for entry in trees.join(manifest, lambda name: torch.empty(0))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # incomplete: no training resumes from it


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
