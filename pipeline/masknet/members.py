"""Members of a pool: past classifiers, each in its own file that is written once."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saltern.pipeline.naming import brief
from saltern.pipeline.storage.files import publish
from saltern.schemas.errors import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """A past classifier, which never changes."""

    step: int  # of the snapshot
    state: State  # on the CPU; weights, perhaps in 16 bits, and buffers

    @cached_property
    def digest(self) -> str:
        """The sha256, hex, of step and state: name, dtype, shape and bytes of each entry, in order of names."""
        total = hashlib.sha256(f"{self.step}\n".encode())
        for key, value in sorted(self.state.items()):
            total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def member_file(step: int) -> str:
    """Return the file name of a member."""
    return f"{step}.safetensors"


def write_member(path: Path, member: Member) -> None:
    """Write a member's file, which is visible only when it is complete."""
    path.parent.mkdir(exist_ok=True, parents=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    # A single metadata entry: safetensors would write several in random order.
    state = {key: value.contiguous() for key, value in member.state.items()}
    safetensors.torch.save_file(state, unfinished, {"digest": member.digest})
    publish(unfinished, path)


def read_member(path: Path, entry: Mapping[str, Any]) -> Member:
    """Read a member's file. Raises UserError if it is missing, damaged, or not of the step and digest of the entry."""
    try:
        member = Member(entry["step"], safetensors.torch.load_file(path))
    except FileNotFoundError as error:
        raise UserError(f"the pool file {path} is missing; restore it, or train again in another folder") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the pool file {path} is damaged ({brief(error)}); restore it") from error
    if member.digest != entry["digest"]:
        raise UserError(f"the pool file {path} is not the one that was saved; restore it")
    return member
