"""Mutated inputs for the fuzz tests. The same seed gives the same mutations."""

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

# Values that a reader of JSON must survive in any place.
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1e60, float("nan"), "", "x", "\ud800", "\x1b[2J", "../../up", [], {}, [[]], {"": 0},
)  # fmt: skip


class Fuzz:
    """A seeded stream of mutations that ends when its time is over.

    Args:
        seconds: time for all rounds.
        seed: of the stream.
    """

    def __init__(self, seconds: float, seed: int = 0):
        self.random = random.Random(seed)
        self.rounds = 0
        self._end = time.monotonic() + seconds

    def __iter__(self) -> Iterator[random.Random]:
        """Yield the random generator, once for each round; at least one round."""
        while not self.rounds or time.monotonic() < self._end:
            self.rounds += 1
            yield self.random


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four random changes: flips, cuts, insertions, repetitions, overwritten blocks."""
    for _ in range(rng.randint(1, 4)):
        raw = rng.choice(_CHANGES)(raw, rng)
    return raw


def mutate_json(raw: bytes, rng: random.Random) -> bytes:
    """Return a JSON document with one value or key changed, removed or added; now and then its bytes are mutated."""
    if rng.random() < 0.2:
        return mutate_bytes(raw, rng)
    value = json.loads(raw)
    places = list(_places(value))
    if not places:
        return json.dumps(rng.choice(ODD_VALUES)).encode()
    container, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            container[key] = rng.choice(ODD_VALUES)
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[f"{key}_" if rng.random() < 0.5 else "x"] = rng.choice(ODD_VALUES)
        case _:
            old = container[key]
            container[key] = old + 1 if isinstance(old, int | float) else f"{old}x"
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield value, key
        yield from _places(below)


def _flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _remove(raw: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(raw) + 1)
    return raw[:start] + raw[start + rng.choice((1, 16, 512)) :]


def _insert(raw: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(raw) + 1)
    return raw[:start] + rng.randbytes(rng.choice((1, 16, 512))) + raw[start:]


def _overwrite(raw: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(raw) + 1), rng.choice((1, 8, 512))
    new = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return (raw[:start] + new + raw[start + length :])[: max(len(raw), start + length)]


def _repeat(raw: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(raw) + 1)
    return raw[: start + 512] + raw[start:]


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _remove,
    _insert,
    _overwrite,
    _repeat,
)
