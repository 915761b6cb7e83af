"""Find the shards of a run that are to be judged, at their present paths."""

from collections.abc import Sequence
from pathlib import Path

from saltern.pipeline.runs.places import find_shards
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard


def wanted_shards(run: SaliencyRun, patterns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """Return the run's shards that the patterns name, in the run's order, with their present URLs.

    Returns:
        The shards; hints for the user about skipped ones.

    Raises:
        UserError: a shard is not one of this run, or the run has not completed it.
    """
    if not patterns:
        return _done(run, run.run.shards), []
    chosen, hints = find_shards(run.path, run.run, patterns)
    if len(chosen) < len(run.run.shards):
        hints.append(f"{len(chosen)} of the run's {len(run.run.shards)} shards are evaluated")
    return _done(run, [chosen[shard.name] for shard in run.run.shards if shard.name in chosen]), hints


def same_samples(shards: Sequence[Shard], others: Sequence[Shard]) -> bool:
    """Return whether the shards hold the same samples: tars of the same names and sizes, at any place, cut equally."""
    one, other = (sorted((Path(it.url).name, it.size, it.take or 0) for it in some) for some in (shards, others))
    return one == other


def _done(run: SaliencyRun, shards: list[Shard]) -> list[Shard]:
    """Return the same shards. Raise UserError if the run lacks some, with the number of missing samples."""
    done = {shard.name for shard in run.shards}
    missing = [shard for shard in shards if shard.name not in done]
    if missing:
        samples, uncounted = _count(missing)
        others = f", without those of {uncounted} shards that cannot be counted here" if uncounted else ""
        raise UserError(
            f"{run.path} is not complete: {len(missing)} of {len(shards)} shards are missing, {samples:,} "
            f"samples{others}; continue with the same `saltern extract` command, or name only completed shards"
        )
    return shards


def _count(shards: list[Shard]) -> tuple[int, int]:
    """Return the number of samples in local tars, and the number of shards that are remote or cannot be read."""
    samples = uncounted = 0
    for shard in shards:
        try:
            if "://" in shard.url:
                raise OSError("counting would need all of its bytes")
            samples += len(list_keys(shard))
        except (OSError, ShardError):
            uncounted += 1
    return samples, uncounted
