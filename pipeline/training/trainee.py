"""What the loop of a training drives: a plan, which each rank receives, and the trainee that the plan starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from saltern.pipeline.masknet.members import Member
from saltern.pipeline.training.ranks import Ranks

if TYPE_CHECKING:  # these import pyarrow, which an algorithm does not need
    from saltern.pipeline.training.batches import Batch
    from saltern.pipeline.training.index import Index

Say = Callable[[str], None]  # takes a line for the user


class Repeat(Exception):  # noqa: N818 - a turn of the training, which repeats some steps
    """A training must go back to its last checkpoint."""


class Entry(Protocol):
    """The measurements of one step, over all ranks; on the device until they are read."""

    @property
    def step(self) -> int: ...

    def floats(self) -> dict[str, float]:
        """Return one line of the log, with `step`. Waits for the device."""


class Trainee:
    """The networks of a training with their optimisers, on one rank. A step must not wait for the device."""

    device: torch.device
    setbacks = 0  # repetitions before
    remedy = ""  # what to change if a loss is not finite

    @property
    def steps_done(self) -> int:
        """The number of steps so far."""
        raise NotImplementedError

    @property
    def members(self) -> Sequence[Member]:
        """The members of the pool, which have files of their own."""
        return ()

    def begin(self) -> None:
        """Prepare the first step. The state and `setbacks` are loaded."""

    def step(self, batch: "Batch") -> Entry:
        """Train on this rank's share of a batch."""
        raise NotImplementedError

    def observe(self, entry: Entry) -> None:
        """Take note of a step that is in the journal. Raises Repeat."""

    def settle(self) -> bool:
        """Read what was noted, and return whether the state is worth a checkpoint. Raises Repeat."""
        return True

    def validate(self) -> Mapping[str, float] | None:
        """Measure the present state and write that; return the line, or None if nothing was measured."""
        return None

    def finish(self) -> None:
        """Write results. Rank 0 calls it after the last step."""

    def agreement(self) -> tuple[str, object]:
        """Return the name and a digest of what the ranks must have in common at a checkpoint."""
        return "the steps", ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds: with `steps_done` and `pool_manifest`."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        raise NotImplementedError

    def describe(self, line: Mapping[str, float]) -> str:
        """Return the end of a line of progress, from a line of the log."""
        raise NotImplementedError

    def warn(self, line: Mapping[str, float]) -> str | None:
        """Return a warning that follows from a line of the log."""
        return None


@dataclass(frozen=True)
class Plan:
    """A checked training, as each of its ranks receives it."""

    root: Path
    weights: str
    index: "Index"
    steps_per_epoch: int
    threads: int | None  # that decode in each worker; None: as its machine has cores
    config: dict[str, Any]  # of the checkpoints; it has all that `loop` reads, as CASM's does
    tensorboard: bool

    def start(self, ranks: Ranks, say: Say) -> Trainee:
        """Return the trainee at its first step. Raises UserError if it cannot be made on this machine."""
        raise NotImplementedError

    def recover(self, error: Repeat, setbacks: int) -> str:
        """Return a line on a repetition. Raises UserError if there were too many before it."""
        raise NotImplementedError
