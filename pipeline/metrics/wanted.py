"""Which shards of a run are to be judged, and where their tars lie now."""

from collections.abc import Sequence
from dataclasses import replace

from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.shards.expand import ENDINGS, expand
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard


def wanted_shards(run: SaliencyRun, patterns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """The run's shards that the patterns name, in the run's order, with the URLs that they have now.

    A tar that was moved is known by the shard's name at the end of its path, and by its size; one that was changed in
    its place comes with the size that it had, for its reader to refuse.

    Returns:
        The shards; hints in words on what was left out.

    Raises:
        UserError: a shard that is not of this run, or one that the run has not done.
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
    if strangers and (run.run.config.limit is None or not chosen):
        raise UserError(
            f"{strangers[0].url} ({strangers[0].size:,} bytes) is no shard of {run.path}"
            f"{_others(strangers)}; the first of the run's own is {run.run.shards[0].url} "
            f"({run.run.shards[0].size:,} bytes)"
        )
    if strangers:
        hints.append(f"{len(strangers)} shards lie beyond the --limit of the run, and are left out")
    if len(chosen) < len(run.run.shards):
        hints.append(f"{len(chosen)} of the run's {len(run.run.shards)} shards are judged")
    return _done(run, [chosen[shard.name] for shard in run.run.shards if shard.name in chosen]), hints


def _others(strangers: list[Shard]) -> str:
    return f", nor are {len(strangers) - 1} others" if len(strangers) > 1 else ""


def _match(shards: Sequence[Shard], tar: Shard) -> Shard | None:
    """The run's shard that this tar is: the same URL, or else the longest name that its path ends in."""
    for shard in shards:
        if shard.url == tar.url:
            return shard
    path = next((tar.url.removesuffix(ending) for ending in ENDINGS if tar.url.endswith(ending)), tar.url)
    alike = [shard for shard in shards if shard.size == tar.size and f"/{path}".endswith(f"/{shard.name}")]
    return max(alike, key=lambda shard: len(shard.name), default=None)


def _done(run: SaliencyRun, shards: list[Shard]) -> list[Shard]:
    """The same shards. Raises UserError where the run lacks some, saying how many samples are missing."""
    done = {shard.name for shard in run.shards}
    missing = [shard for shard in shards if shard.name not in done]
    if missing:
        samples, uncounted = _count(missing)
        beside = f", beside those of {uncounted} that cannot be counted from here" if uncounted else ""
        raise UserError(
            f"{run.path} is not whole: {len(missing)} of {len(shards)} shards are missing, {samples:,} "
            f"samples{beside}; go on with the same `saltern extract` command, or name only shards that stand"
        )
    return shards


def _count(shards: list[Shard]) -> tuple[int, int]:
    """Samples in local tars, by their headers; and the number of shards that are elsewhere or cannot be read."""
    samples = uncounted = 0
    for shard in shards:
        try:
            if "://" in shard.url:
                raise OSError("it would have to be fetched whole")
            samples += len(list_keys(shard))
        except (OSError, ShardError):
            uncounted += 1
    return samples, uncounted
