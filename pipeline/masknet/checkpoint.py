"""What stands of a training: DIR/checkpoints/<step>/, and DIR/pool/<step>.safetensors, each written once.

A checkpoint holds live weights and optimisers, and of the pool the digests alone. It appears whole under its name or
not at all; a pool file stands before the first checkpoint that names it. Nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saltern.pipeline.naming import brief
from saltern.pipeline.storage.files import fsync, publish
from saltern.schemas.errors import UserError

FORMAT = 1
KEPT = 2  # checkpoints; the older go, and the pool files that none of the kept ones names
_TENSORS, _REST, _UNFINISHED = "tensors.safetensors", "state.json", ".unfinished-"


State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """A past classifier: never changed once made, so that a file of it is written once."""

    step: int  # whose snapshot it is
    state: State  # on the CPU; weights, perhaps in 16 bits, and buffers

    @cached_property
    def digest(self) -> str:
        """sha256, hex, over its step and the state: name, dtype, shape and bytes of each entry, in order of names."""
        total = hashlib.sha256(f"{self.step}\n".encode())
        for key, value in sorted(self.state.items()):
            total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """One that stands, and was found whole."""

    folder: Path
    step: int  # steps done
    config: dict[str, Any]  # of the training, JSON
    tree: dict[str, Any]  # the state with names in place of tensors
    digest: str  # sha256 over all of it, hex

    def part(self, name: str) -> Any:
        """One entry of the state, its tensors on the CPU; None where there is none."""
        if name not in self.tree:
            return None
        with safetensors.safe_open(self.folder / _TENSORS, "pt") as held:
            return _planted(self.tree[name], held.get_tensor)

    def state(self) -> dict[str, Any]:
        """All of `Training.state_dict`, the pool's members read from their files.

        Raises:
            UserError: a pool file that is missing or not the one that was saved; it is named.
        """
        state = {name: self.part(name) for name in self.tree}
        pool = self.folder.parent.parent / "pool"
        members = [_read_member(pool / _pool_name(entry["step"]), entry) for entry in state["pool_manifest"]]
        state["pool"] = {"members": [{"step": member.step, "state": member.state} for member in members]}
        return state


class Checkpoints:
    """The checkpoints of one training, and its pool files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: dict[int, str] = {}  # digests of the pool files that are known to be whole, by step

    def newest(self, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest whole one; None where there is none at all.

        Raises:
            UserError: there are some, and none is whole.
        """
        folders = _standing(self.root / "checkpoints")
        for folder in reversed(folders):
            try:
                return _opened(folder)
            except UserError as error:
                say(f"{error}; an older one is taken, if there is any")
        if folders:
            raise UserError(f"none of the {len(folders)} checkpoints in {self.root / 'checkpoints'} is whole")
        return None

    def save(self, state: Mapping[str, Any], config: Mapping[str, Any], members: Sequence[Member]) -> Path:
        """Write a checkpoint of `Training.state_dict(pool=False)` with the pool's members; then remove old ones."""
        for member in members:
            self._keep(member)
        tensors: dict[str, Tensor] = {}
        tree = {name: _stripped(value, name, tensors) for name, value in state.items()}
        folder = self.root / "checkpoints" / str(state["steps_done"])
        made = folder.with_name(f"{_UNFINISHED}{folder.name}")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        safetensors.torch.save_file(tensors, made / _TENSORS)
        rest = {"format": FORMAT, "step": state["steps_done"], "sha256": _sha256(made / _TENSORS)}
        (made / _REST).write_text(json.dumps({**rest, "config": config, "state": tree}))
        for file in (made / _TENSORS, made / _REST, made):
            fsync(file)
        shutil.rmtree(folder, ignore_errors=True)  # one that was not whole
        made.rename(folder)
        fsync(folder.parent)
        self._clear()
        return folder

    def _keep(self, member: Member) -> None:
        """Write a pool file, where it is not known to stand."""
        if self._written.get(member.step) == member.digest:
            return
        path = self.root / "pool" / _pool_name(member.step)
        path.parent.mkdir(exist_ok=True, parents=True)
        made = path.with_name(f"{_UNFINISHED}{path.name}")
        # One entry of metadata alone: safetensors writes several in random order.
        state = {key: value.contiguous() for key, value in member.state.items()}
        safetensors.torch.save_file(state, made, {"digest": member.digest})
        publish(made, path)
        self._written[member.step] = member.digest

    def known(self, members: Sequence[Member]) -> None:
        """These were read from their files, and need not be written again."""
        self._written.update({member.step: member.digest for member in members})

    def _clear(self) -> None:
        folders = _standing(self.root / "checkpoints")
        for folder in folders[:-KEPT]:
            going = folder.with_name(f"{_UNFINISHED}{folder.name}")
            folder.rename(going)  # so that a kill leaves no half of it under its name
        for left in (self.root / "checkpoints").glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        named = {_pool_name(step) for folder in folders[-KEPT:] for step in _pool_steps(folder)}
        for file in (self.root / "pool").glob("*"):
            if file.name not in named:
                file.unlink()


def open_checkpoint(path: Path) -> Checkpoint:
    """The newest of a training's folder, or the one in a folder of its own. Raises UserError where there is none."""
    if (path / _REST).is_file():
        return _opened(path)
    found = Checkpoints(path).newest() if path.is_dir() else None
    if found is None:
        raise UserError(f"{path} holds no checkpoint; `saltern train-casm SHARDS --out {path}` makes one")
    return found


def _opened(folder: Path) -> Checkpoint:
    try:
        raw = (folder / _REST).read_bytes()
        held = json.loads(raw)
        if held["format"] != FORMAT:
            raise UserError(f"{folder} is of format {held['format']}, and {FORMAT} can be read")
        whole = _sha256(folder / _TENSORS) == held["sha256"]
        found = Checkpoint(
            folder.absolute(), held["step"], held["config"], held["state"], hashlib.sha256(raw).hexdigest()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {folder} is damaged ({brief(error)})") from error
    if not whole:
        raise UserError(f"the checkpoint {folder} is damaged ({_TENSORS} is not as it was written)")
    return found


def _standing(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step, whole or not."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _pool_name(step: int) -> str:
    return f"{step}.safetensors"


def _pool_steps(folder: Path) -> list[int]:
    try:
        manifest = json.loads((folder / _REST).read_bytes())["state"]["pool_manifest"]
        return [entry["step"] for entry in _planted(manifest, lambda name: torch.empty(0))]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not whole: it will not be gone on from


def _read_member(path: Path, wanted: Mapping[str, Any]) -> Member:
    try:
        member = Member(wanted["step"], safetensors.torch.load_file(path))
    except FileNotFoundError as error:
        raise UserError(f"the pool file {path} is missing; restore it, or train anew in another folder") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the pool file {path} is damaged ({brief(error)}); restore it") from error
    if member.digest != wanted["digest"]:
        raise UserError(f"the pool file {path} is not the one that was saved; restore it")
    return member


def _stripped(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a state whose tensors go under their paths into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # a clone, as no two may share memory
        return {"tensor": name}
    if isinstance(value, Mapping):  # as pairs: an optimiser's keys are numbers
        return {"map": [[key, _stripped(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_stripped(item, f"{name}/{place}", tensors) for place, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    return {"value": value}


def _planted(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    ((kind, held),) = tree.items()
    if kind == "tensor":
        return tensor(held)
    if kind == "map":
        return {key: _planted(item, tensor) for key, item in held}
    if kind in ("list", "tuple"):
        items = [_planted(item, tensor) for item in held]
        return tuple(items) if kind == "tuple" else items
    return held


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
