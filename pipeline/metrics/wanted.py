"""Find the shards of a run that are to be judged, at their present paths."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saltern.pipeline.runs.manifest import data_name, other_sizes, read_failures
from saltern.pipeline.runs.places import find_shards
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard


def wanted_shards(
    run: SaliencyRun, patterns: Sequence[str], *, skip_failed: bool = False
) -> tuple[list[Shard], dict[str, str], list[str]]:
    """Return the run's shards that the patterns name, in the run's order, with their present URLs.

    Args:
        run: that is judged.
        patterns: paths, URLs, globs or folders; none = all shards, where the run read them.
        skip_failed: whether shards may lack that failed in the run.

    Returns:
        The shards; why those that failed did, by name; hints for the user about skipped ones.

    Raises:
        UserError: a shard is not one of this run, or the run has not completed it.
    """
    if not patterns:
        return run.run.shards, _failed(run, run.run.shards, skip_failed), []
    chosen, hints = find_shards(run.path, run.run, patterns)
    if len(chosen) < len(run.run.shards):
        count = f"{len(chosen)} of the run's {len(run.run.shards)} shards"
        hints.append(f"{count} are evaluated: RUN/metrics/*.json are of these alone until all are evaluated again")
    shards = [chosen[shard.name] for shard in run.run.shards if shard.name in chosen]
    return shards, _failed(run, shards, skip_failed), hints


def damaged(run: SaliencyRun, shards: Sequence[Shard]) -> dict[str, str]:
    """Return why data files of the shards are not those that the run wrote, by name: from one listing of sizes."""
    wanted = {shard.name for shard in shards}
    found = other_sizes(run.store, (receipt for receipt in run.receipts if receipt.shard in wanted))
    return {
        name: f"{run.store.full(data_name(name))} {what}; repeat the `saltern extract` command"
        for name, what in found.items()
    }


def same_samples(shards: Sequence[Shard], others: Sequence[Shard]) -> bool:
    """Return whether the shards hold the same samples: tars of the same names and sizes, at any place, cut equally."""
    one, other = (sorted(map(_tar, some)) for some in (shards, others))
    return one == other


def left_out(runs: Sequence[Sequence[Shard]], lost: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return which shards each run must leave out, so that all have the same samples, and why.

    Args:
        runs: the shards of each run, which hold the same samples.
        lost: the shards that cannot be judged in each run, and why, by name.
    """
    names = [{shard.name for shard in shards} for shards in runs]
    # Runs may name the same tars otherwise. Tars of one name and size are then all left out.
    key: Callable[[Shard], Any] = _name if all(own == names[0] for own in names) else _tar
    why: dict[Any, str] = {}
    for shards, own in zip(runs, lost, strict=True):
        why.update((key(shard), own[shard.name]) for shard in reversed(shards) if shard.name in own)
    return [
        {shard.name: own.get(shard.name, why[key(shard)]) for shard in shards if key(shard) in why}
        for shards, own in zip(runs, lost, strict=True)
    ]


def _tar(shard: Shard) -> tuple[str, int, int]:
    return Path(shard.url).name, shard.size, shard.take or 0


def _name(shard: Shard) -> str:
    return shard.name


def _failed(run: SaliencyRun, shards: Sequence[Shard], skip_failed: bool) -> dict[str, str]:
    """Return why shards failed in the run, by name. Raise UserError if others are missing, with their samples."""
    done = {shard.name for shard in run.shards}
    missing = [shard for shard in shards if shard.name not in done]
    failures = read_failures(run.store, done) if missing and skip_failed else {}
    missing = [shard for shard in missing if shard.name not in failures]
    if missing:
        samples, uncounted = _count(missing)
        others = f", without those of {uncounted} shards that cannot be counted here" if uncounted else ""
        raise UserError(
            f"{run.path} is not complete: it lacks {len(missing)} of {len(shards)} shards, {samples:,} "
            f"samples{others}; continue with the same `saltern extract` command, or name only completed shards"
        )
    wanted = {shard.name for shard in shards}
    return {name: f"{it.kind}: {it.reason}" for name, it in failures.items() if name in wanted}


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
