"""Compare a run's labels with the model's top-1: labels that are not the model's class numbers agree by chance only."""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from saltern.pipeline.runs.datafile import reading_data
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EXTRACT
from saltern.schemas.errors import ShardError
from saltern.schemas.run import Run, Shard

SAMPLES, SHARDS = 512, 16  # looked at, at most, at equal distances
WEAK = 0.1  # accuracy above chance that even a weak model has: (accuracy - chance) / (1 - chance)
UNLIKELY, SIGNIFICANT = 0.001, 0.01  # probabilities


@dataclass(frozen=True)
class Agreement:
    """How often labels and top-1 agree, in some samples of a run."""

    samples: int
    agreeing: int
    classes: int  # of the model
    explained: bool  # the maps explain the labels

    @property
    def doubtful(self) -> bool:
        """Whether the labels agree with top-1 no better than chance.

        Two binomial tests must say so: guessing among the classes gives as many agreements or more in over 1 % of all
        cases, and a model that is WEAK above chance gives so few in under 0.1 %. So a weak model raises no alarm.
        """
        chance = 1 / self.classes
        weak = chance + (1 - chance) * WEAK
        return not self.proven and _at_most(self.agreeing, self.samples, weak) < UNLIKELY

    @property
    def proven(self) -> bool:
        """Whether the labels agree with top-1 more often than guessing among the classes would."""
        return 1 - _at_most(self.agreeing - 1, self.samples, 1 / self.classes) < SIGNIFICANT

    @property
    def text(self) -> str:
        return (
            f"the labels are the model's top-1 in {self.agreeing} of {self.samples} samples, which is no better than "
            f"chance (1 in {self.classes}): `cls` does not seem to hold the model's class numbers"
        )


def _at_most(count: int, samples: int, share: float) -> float:
    """Return the probability of at most `count` hits in `samples` draws that each hit with probability `share`."""
    if share >= 1:
        return float(count >= samples)
    return math.fsum(math.comb(samples, n) * share**n * (1 - share) ** (samples - n) for n in range(count + 1))


def measure_agreement(store: Store, run: Run, done: Collection[str]) -> Agreement | None:
    """Return the agreement in the rows that are there; None if the job explains no image or no sample has a label.

    Args:
        done: names of the shards with a receipt. Data files that cannot be read are left out.
    """
    if run.config.job != EXTRACT:
        return None
    shards = [shard for shard in run.shards if shard.name in done]
    count = min(SHARDS, len(shards))
    chosen = [shards[number * len(shards) // count] for number in range(count)]
    rows = [row for shard in chosen for row in _rows(store, run, shard, SAMPLES // count)]
    if not rows:
        return None
    agreeing = sum(row["label"] == row["predicted"] for row in rows)
    labels = run.config.to_dict()["target"] == "label"
    explained = labels and any(row["target"] is not None for row in rows)  # a class-agnostic method has no target
    return Agreement(len(rows), agreeing, run.config.classes, explained)


def _rows(store: Store, run: Run, shard: Shard, count: int) -> Iterator[dict[str, Any]]:
    """Yield label, top-1 and target of some samples of a shard."""
    with contextlib.suppress(ShardError), reading_data(store, run, shard) as file:
        table = file.read(["index", "label", "predicted", "target"], use_threads=False).to_pylist()
        rows = {row["index"]: row for row in table if row["label"] is not None and row["predicted"] is not None}
        yield from list(rows.values())[:: max(1, -(-len(rows) // count))]


def label_doubt(store: Store, run: Run, done: Collection[str]) -> str | None:
    """Return a line with the fix if the run explains labels that agree with top-1 no better than chance."""
    found = measure_agreement(store, run, done)
    if found is None or not found.explained or not found.doubtful:
        return None
    return f"{found.text}; redo the run with --labels FILE or --target top1 and --overwrite"
