"""The ranks of a data-parallel training. A training in one process is rank 0 of 1.

Whoever starts the ranks creates torch.distributed's process group.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process and its place among the ranks; more than one use torch.distributed's default group."""

    device: torch.device
    rank: int = 0
    world: int = 1
    on_machine: int = 1  # ranks on this machine, which share its memory

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place, with one exchange per dtype.

        All ranks call it with the same shapes.
        """
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_dtype.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
            dist.all_reduce(flat)
            flat /= self.world
            parts = torch.split(flat, [tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def agree(self, what: str, *values: object) -> None:
        """Check that all ranks have the same values.

        Raises:
            UserError: they differ; on every rank.
        """
        if self.world == 1:
            return
        digest = hashlib.sha256(repr(values).encode()).digest()
        own = torch.tensor(list(digest), dtype=torch.uint8, device=self.device)
        digests = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(digests, own)
        others = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
        if others:
            raise UserError(
                f"ranks disagree on {what}: rank 0 and rank {', '.join(map(str, others))}; start a new training"
            )
