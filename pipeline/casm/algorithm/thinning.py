"""Which past classifiers a mask is trained against: the published hyperparameters, and every draw, known in advance.

All that is drawn follows from (seed, step) alone, so that ranks agree without talking, a resumed run goes on with the
same draws, and the next pool member can be fetched before it is needed.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from saltern.pipeline.naming import nearest
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Thinning:
    """How the expectation over classifiers is approximated (Zolna 2020, section 3.3)."""

    name: str
    trained: bool  # the classifier learns beside the mask
    hp: float  # probability of a past classifier in place of the current one
    save_every: int | None  # iterations from snapshot to snapshot; None: the first alone
    entropy: float  # lambda for the entropy score, picked by hand for ResNet-50 on ImageNet
    classification: float  # lambda for the classification score, likewise

    def lambda_for(self, score: str) -> float:
        """The published weight of the penalty on size."""
        return self.entropy if score == "entropy" else self.classification

    def snapshots(self, step: int) -> bool:
        """Whether the classifier is kept at this step (from 0): once the pool is empty, then every `save_every`."""
        if self.hp == 0:
            return False
        return step == 0 or (self.save_every is not None and (step + 1) % self.save_every == 0)

    def taken(self, step: int) -> int:
        """Snapshots taken before this step."""
        if self.hp == 0 or step == 0:
            return 0
        every = self.save_every
        return 1 + (0 if every is None else step // every - (every == 1))


THINNINGS = {
    thinning.name: thinning
    for thinning in (
        Thinning("F", False, 0, None, 2.5, 9),  # the fixed classifier, the baseline
        Thinning("L", True, 0, None, 14, 18),
        Thinning("FL", True, 0.5, None, 7.5, 11),
        Thinning("L1000", True, 0.5, 1000, 10, 17),
        Thinning("L100", True, 0.5, 100, 10, 17),
    )
}


def thinning_named(name: str) -> Thinning:
    """One of the published hyperparameters. Raises UserError."""
    if name not in THINNINGS:
        raise UserError(f"unknown thinning {name!r}; {nearest(name, THINNINGS)}known: {', '.join(THINNINGS)}")
    return THINNINGS[name]


class Draws(NamedTuple):
    """What chance decides in one iteration; each uniform in [0, 1)."""

    coin: float  # below hp: a past classifier
    pick: float  # which of them
    slot: float  # which one a snapshot replaces in a full pool


def draws(seed: int, step: int, rank: int | None = None) -> Draws:
    """The draws of one iteration. With a rank, that rank picks a member of its own; coin and slot stay common."""
    shared = random.Random(f"casm {seed} {step}")  # a text is hashed by sha512: the same on every machine
    coin, slot, pick = shared.random(), shared.random(), shared.random()
    own = pick if rank is None else random.Random(f"casm {seed} {step} {rank}").random()
    return Draws(coin, own, slot)


class Plan(NamedTuple):
    """What one iteration does with the pool."""

    slot: int | None  # where this step's snapshot goes; None: no snapshot
    member: int  # the slot of the past classifier that judges the mask; -1: the current one does


def plan(thinning: Thinning, pool_size: int, seed: int, step: int, rank: int | None = None) -> Plan:
    """The plan of one iteration, from its number alone.

    Args:
        pool_size: at most so many past classifiers; a snapshot for a full pool overwrites a uniformly drawn one.
        rank: None where all ranks share one member.
    """
    coin, pick, replaced = draws(seed, step, rank)
    before, after = (min(thinning.taken(number), pool_size) for number in (step, step + 1))
    slot = None
    if thinning.snapshots(step):
        slot = before if before < pool_size else int(replaced * pool_size)
    return Plan(slot, int(pick * after) if after and coin < thinning.hp else -1)


@contextlib.contextmanager
def repeatable(device: torch.device, seed: int, step: int, rank: int) -> Iterator[None]:
    """torch's own generators, which dropout draws from, start from the step's number; then they are put back."""
    noise = random.Random(f"casm {seed} {step} noise {rank}").getrandbits(63)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(noise)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(noise)
        yield
