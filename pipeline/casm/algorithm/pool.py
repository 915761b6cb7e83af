"""The thinned pool of past classifiers, and a network that loads the weights of one of them."""

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
        half: keep weights in float16. Buffers keep their precision: a variance can exceed float16's range.
        pinned: keep restored members in pinned memory, as snapshots of a GPU are, which is copied without a wait.
    """

    def __init__(self, size: int, half: bool = False, pinned: bool = False) -> None:
        self.size, self.half, self._pinned = size, half, pinned
        self.members: list[Member] = []
        self._copied: torch.cuda.Event | None = None  # the last snapshot is complete

    def __len__(self) -> int:
        return len(self.members)

    def add(self, model: nn.Module, step: int, slot: int) -> Member:
        """Add a snapshot of a model. On CUDA its copy goes on after this call; `digest` and the like wait for it.

        Args:
            step: of the training.
            slot: the number of members; in a full pool, the member to replace.
        """
        if slot > len(self.members) or slot >= self.size:
            raise ValueError(f"slot {slot} of a pool that holds {len(self.members)} of {self.size}")
        member = Member(step, self._snapshot(model))
        device = next(model.parameters()).device
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(device))
        self.members[slot : slot + 1] = [member]
        return member

    def _snapshot(self, model: nn.Module) -> State:
        weights = {name for name, _ in model.named_parameters()}
        state = model.state_dict()
        return {key: _cloned(value, self.half and key in weights) for key, value in state.items()}

    def needs(self, model: nn.Module) -> int:
        """Return the size of the full pool, bytes."""
        weights = {name for name, _ in model.named_parameters()}
        total = 0
        for key, value in model.state_dict().items():
            halved = self.half and key in weights and value.is_floating_point()
            total += value.numel() * (2 if halved else value.element_size())
        return self.size * total

    def digest(self) -> str:
        """Return the sha256, hex, of all members by slot, which ranks compare."""
        self._wait()
        return hashlib.sha256("\n".join(member.digest for member in self.members).encode()).hexdigest()

    def manifest(self) -> list[dict[str, Any]]:
        """Return step and digest of each member by slot, for a checkpoint whose members are in separate files."""
        self._wait()
        return [{"step": member.step, "digest": member.digest} for member in self.members]

    def state_dict(self) -> dict[str, Any]:
        """Return all members with their weights."""
        self._wait()
        return {"members": [{"step": member.step, "state": dict(member.state)} for member in self.members]}

    def load_state_dict(self, state: Mapping[str, Any], manifest: list[dict[str, Any]] | None = None) -> None:
        """Replace the members by those of a `state_dict`.

        Args:
            manifest: as `manifest` gives it; the members must match it.

        Raises:
            UserError: there are more members than fit, or one is not in the manifest.
        """
        members = [Member(entry["step"], entry["state"]) for entry in state["members"]]
        if len(members) > self.size:
            raise UserError(
                f"the pool holds {self.size} classifiers and the checkpoint {len(members)}; raise pool_size"
            )
        if manifest is not None:
            if len(manifest) != len(members):
                raise UserError(f"the pool has {len(members)} classifiers, its checkpoint names {len(manifest)}")
            for slot, (member, entry) in enumerate(zip(members, manifest, strict=True)):
                if (member.step, member.digest) != (entry["step"], entry["digest"]):
                    raise UserError(
                        f"the pool's classifier {slot} (step {entry['step']}) is not the one that was saved"
                    )
        if self._pinned:
            pinned = [{key: value.pin_memory() for key, value in member.state.items()} for member in members]
            members = [Member(member.step, state) for member, state in zip(members, pinned, strict=True)]
        self.members = members

    def _wait(self) -> None:
        """Wait until the snapshots are complete on the host."""
        if self._copied is not None:
            self._copied.synchronize()


class Confuser:
    """A frozen copy of the classifier, on the same device, that loads the weights of pool members."""

    def __init__(self, classifier: nn.Module) -> None:
        self._model = copy.deepcopy(classifier).eval().requires_grad_(False)
        self._held: Member | None = None
        device = next(classifier.parameters()).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fetch(self, member: Member) -> None:
        """Start to copy a member's weights, unless they are loaded already; on CUDA, in parallel to other work."""
        if member is self._held:
            return
        self._held = member
        if self._stream is None:
            self._take(member)
            return
        self._stream.wait_stream(
            torch.cuda.current_stream(self._stream.device)
        )  # the last forward pass has used the old weights
        with torch.cuda.stream(self._stream):
            self._take(member)

    def classify(self, x_BCHW: Tensor, member: Member) -> Tensor:
        """Return logits_BK of a member in eval mode. Only the images receive a gradient."""
        self.fetch(member)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return logits_of(self._model(x_BCHW))

    @torch.no_grad()
    def _take(self, member: Member) -> None:
        for key, value in self._model.state_dict().items():
            # Copied in 16 bits and converted on the device: copy_ would convert on the CPU, and block.
            value.copy_(member.state[key].to(value.device, non_blocking=True))


def _cloned(value: Tensor, half: bool) -> Tensor:
    value = value.detach().half() if half and value.is_floating_point() else value.detach()
    # Always a copy, as the model changes its weights in place. Pinned memory is copied both ways without a wait.
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)
