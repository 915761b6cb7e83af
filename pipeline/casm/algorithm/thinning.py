"""Thinning: the choice of the classifier that each mask is trained against. The published kinds, and the random draws.

All draws follow from (seed, step). So ranks agree without communication, a resumed training has the same draws, and
the next pool member can be fetched before it is needed.
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
    """An approximation of the expectation over classifiers (Zolna 2020, section 3.3)."""

    name: str
    trained: bool  # the classifier learns together with the mask
    hp: float  # probability of a past classifier instead of the current one
    save_every: int | None  # iterations from snapshot to snapshot; None: only the first snapshot
    entropy: float  # lambda for the entropy score, hand-picked for ResNet-50 on ImageNet
    classification: float  # lambda for the classification score, also hand-picked

    def lambda_for(self, score: str) -> float:
        """Return the published weight of the size penalty."""
        return self.entropy if score == "entropy" else self.classification

    def snapshots(self, step: int) -> bool:
        """Return whether step 0, 1, .. adds a snapshot to the pool: the first, then every `save_every`-th."""
        if self.hp == 0:
            return False
        return step == 0 or (self.save_every is not None and (step + 1) % self.save_every == 0)

    def taken(self, step: int) -> int:
        """Return the number of snapshots before this step."""
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
    """Return a published thinning by its name. Raises UserError if the name is unknown."""
    if name not in THINNINGS:
        raise UserError(f"unknown thinning {name!r}; {nearest(name, THINNINGS)}known: {', '.join(THINNINGS)}")
    return THINNINGS[name]


class Draws(NamedTuple):
    """The random numbers of one iteration, each uniform in [0, 1)."""

    coin: float  # below hp: use a past classifier
    pick: float  # which past classifier
    slot: float  # which member a snapshot replaces in a full pool


def draws(seed: int, step: int, rank: int | None = None) -> Draws:
    """Return the draws of one iteration. With a rank, the pick is that rank's; all ranks share coin and slot."""
    shared = random.Random(f"casm {seed} {step}")  # strings are hashed by sha512: the same on every machine
    coin, slot, pick = shared.random(), shared.random(), shared.random()
    own = pick if rank is None else random.Random(f"casm {seed} {step} {rank}").random()
    return Draws(coin, own, slot)


class Plan(NamedTuple):
    """The pool operations of one iteration."""

    slot: int | None  # for this step's snapshot; None: no snapshot
    member: int  # slot of the past classifier that classifies the masked images; -1: the current one


def plan(thinning: Thinning, pool_size: int, seed: int, step: int, rank: int | None = None) -> Plan:
    """Return the plan of one iteration.

    Args:
        pool_size: largest number of past classifiers; a snapshot in a full pool replaces a uniformly drawn one.
        rank: None if all ranks share one member.
    """
    coin, pick, replaced = draws(seed, step, rank)
    before, after = (min(thinning.taken(number), pool_size) for number in (step, step + 1))
    slot = None
    if thinning.snapshots(step):
        slot = before if before < pool_size else int(replaced * pool_size)
    return Plan(slot, int(pick * after) if after and coin < thinning.hp else -1)


@contextlib.contextmanager
def repeatable(device: torch.device, seed: int, step: int, rank: int) -> Iterator[None]:
    """Seed torch's generators, which dropout uses, by the step's number; restore them afterwards."""
    noise = random.Random(f"casm {seed} {step} noise {rank}").getrandbits(63)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(noise)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(noise)
        yield
