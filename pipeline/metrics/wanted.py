"""Find the shards of a run that are to be judged, at their present paths."""

from collections.abc import Sequence
from dataclasses import replace

from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.shards.expand import ENDINGS, expand
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard


def wanted_shards(run: SaliencyRun, patterns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """Return the run's shards that the patterns name, in the run's order, with their present URLs.

    A moved tar is recognised by its size and by the shard's name at the end of its path. A tar changed in place keeps
    the planned size here, so that its reader refuses it.

    Returns:
        The shards; hints for the user about skipped ones.

    Raises:
        UserError: a shard is not one of this run, or the run has not completed it.
    """
    if not patterns:
        return _done(run, run.run.shards), []
    given, hints = expand(patterns)
    chosen: dict[str, Shard] = {}
    strangers = []
    for tar in given:
        shard = _match(run.run.shards, tar)
        if shard is None:
            strangers.append(tar)
        elif shard.name in chosen:
            raise UserError(f"{tar.url} and {chosen[shard.name].url} are both the run's {shard.name}; name one of them")
        else:
            chosen[shard.name] = replace(shard, url=tar.url)
    if strangers and (run.config.limit is None or not chosen):
        raise UserError(
            f"{strangers[0].url} ({strangers[0].size:,} bytes) is not a shard of {run.path}"
            f"{_others(strangers)}; the run's first is {run.run.shards[0].url} "
            f"({run.run.shards[0].size:,} bytes)"
        )
    if strangers:
        hints.append(f"{len(strangers)} shards are beyond the --limit of the run and are skipped")
    if len(chosen) < len(run.run.shards):
        hints.append(f"{len(chosen)} of the run's {len(run.run.shards)} shards are evaluated")
    return _done(run, [chosen[shard.name] for shard in run.run.shards if shard.name in chosen]), hints


def _others(strangers: list[Shard]) -> str:
    return f", nor are {len(strangers) - 1} others" if len(strangers) > 1 else ""


def _match(shards: Sequence[Shard], tar: Shard) -> Shard | None:
    """Return the run's shard with this tar's URL, or else the one with the longest name that its path ends in."""
    for shard in shards:
        if shard.url == tar.url:
            return shard
    path = next((tar.url.removesuffix(ending) for ending in ENDINGS if tar.url.endswith(ending)), tar.url)
    alike = [shard for shard in shards if shard.size == tar.size and f"/{path}".endswith(f"/{shard.name}")]
    return max(alike, key=lambda shard: len(shard.name), default=None)


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
