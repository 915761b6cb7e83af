"""The thinned pool of past classifiers, and the one of them that judges a mask."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.masknet.members import Member, State
from saltern.pipeline.models.passes import logits_of
from saltern.schemas.errors import UserError


class Pool:
    """At most `size` past classifiers, by slot.

    Args:
        half: weights in float16, half the memory. Buffers keep their precision: a variance may exceed float16's range.
    """

    def __init__(self, size: int, half: bool = False) -> None:
        self.size, self.half = size, half
        self.members: list[Member] = []

    def __len__(self) -> int:
        return len(self.members)

    def add(self, model: nn.Module, step: int, slot: int) -> Member:
        """Keep a model as it is now; slot is the number of members, or, of a full pool, the member that goes."""
        if slot > len(self.members) or slot >= self.size:
            raise ValueError(f"slot {slot} of a pool that holds {len(self.members)} of {self.size}")
        member = Member(step, self._snapshot(model))
        self.members[slot : slot + 1] = [member]
        return member

    def _snapshot(self, model: nn.Module) -> State:
        weights = {name for name, _ in model.named_parameters()}
        state = model.state_dict()
        return {key: _cloned(value, self.half and key in weights) for key, value in state.items()}

    def needs(self, model: nn.Module) -> int:
        """Bytes that the pool takes once it is full."""
        weights = {name for name, _ in model.named_parameters()}
        total = 0
        for key, value in model.state_dict().items():
            halved = self.half and key in weights and value.is_floating_point()
            total += value.numel() * (2 if halved else value.element_size())
        return self.size * total

    def digest(self) -> str:
        """sha256, hex, over all members by slot: ranks compare it."""
        return hashlib.sha256("\n".join(member.digest for member in self.members).encode()).hexdigest()

    def manifest(self) -> list[dict[str, Any]]:
        """step and digest of each member by slot: what a checkpoint needs where each member has a file of its own."""
        return [{"step": member.step, "digest": member.digest} for member in self.members]

    def state_dict(self) -> dict[str, Any]:
        """All members whole."""
        return {"members": [{"step": member.step, "state": dict(member.state)} for member in self.members]}

    def load_state_dict(self, state: Mapping[str, Any], manifest: list[dict[str, Any]] | None = None) -> None:
        """Take the members of a `state_dict`, in place of those held.

        Args:
            manifest: of `manifest`, which the members must match.

        Raises:
            UserError: more members than fit, or one that the manifest does not name.
        """
        members = [Member(entry["step"], entry["state"]) for entry in state["members"]]
        if len(members) > self.size:
            raise UserError(
                f"the pool holds {self.size} classifiers and the checkpoint {len(members)}; raise pool_size"
            )
        if manifest is not None:
            if len(manifest) != len(members):
                raise UserError(f"the pool has {len(members)} classifiers, its checkpoint names {len(manifest)}")
            for slot, (member, wanted) in enumerate(zip(members, manifest, strict=True)):
                if (member.step, member.digest) != (wanted["step"], wanted["digest"]):
                    raise UserError(
                        f"the pool's classifier {slot} (step {wanted['step']}) is not the one that was saved"
                    )
        self.members = members


class Confuser:
    """A frozen copy of the classifier, on its device, that takes the weights of pool members."""

    def __init__(self, classifier: nn.Module) -> None:
        self._model = copy.deepcopy(classifier).eval().requires_grad_(False)
        self._held: Member | None = None
        device = next(classifier.parameters()).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fetch(self, member: Member) -> None:
        """Begin to take a member's weights; on CUDA beside what is being computed. Free where it is held already."""
        if member is self._held:
            return
        self._held = member
        if self._stream is None:
            self._take(member)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # the last judgement has been read
        with torch.cuda.stream(self._stream):
            self._take(member)

    def judge(self, x_BCHW: Tensor, member: Member) -> Tensor:
        """logits_BK of a member in eval mode; a gradient reaches the images alone."""
        self.fetch(member)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return logits_of(self._model(x_BCHW))

    @torch.no_grad()
    def _take(self, member: Member) -> None:
        for key, value in self._model.state_dict().items():
            # 16 bits travel as such: a copy that converts would do so on the CPU, and wait.
            value.copy_(member.state[key].to(value.device, non_blocking=True))


def _cloned(value: Tensor, half: bool) -> Tensor:
    value = value.detach().half() if half and value.is_floating_point() else value.detach()
    # A copy always, on the CPU too: the model goes on changing its own. Pinned memory goes back without waiting.
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value)
