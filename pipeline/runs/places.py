"""Find the tars of a run where they are now, and decide which tars may be read."""

from collections.abc import Sequence
from dataclasses import replace

from saltern.pipeline.shards.expand import ENDINGS, expand
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Run, Shard


def find_shards(path: str, run: Run, patterns: Sequence[str]) -> tuple[dict[str, Shard], list[str]]:
    """Return the run's shards that the patterns name, by name, with their present URLs.

    A moved tar is recognised by its size and by the shard's name at the end of its path. A tar changed in place keeps
    the planned size here, so that its reader refuses it.

    Args:
        path: of the run, for messages.
        run: content of its run.json.
        patterns: as the SHARDS of `extract`.

    Returns:
        The shards; hints for the user about skipped ones.

    Raises:
        UserError: a tar is not one of this run.
    """
    given, hints = expand(patterns)
    urls, names = {shard.url: shard for shard in run.shards}, {shard.name: shard for shard in run.shards}
    found: dict[str, Shard] = {}
    strangers = []
    for tar in given:
        shard = urls.get(tar.url) or _named(names, tar)
        if shard is None:
            strangers.append(tar)
        elif shard.name in found:
            raise UserError(f"{tar.url} and {found[shard.name].url} are both the run's {shard.name}; name one of them")
        else:
            found[shard.name] = replace(shard, url=tar.url)
    limit = run.config.to_dict()["limit"]
    if strangers and (limit is None or not found):
        others = f", nor are {len(strangers) - 1} others" if len(strangers) > 1 else ""
        near = _nearest(run, strangers[0])
        first = f"; the run's {near.name} is {near.url} with {near.size:,} bytes" if near is not None else ""
        first += (
            "; copy it again, or name the other tars" if near is not None and near.size != strangers[0].size else ""
        )
        raise UserError(f"{strangers[0].url} ({strangers[0].size:,} bytes) is not a shard of {path}{others}{first}")
    if strangers:
        hints.append(f"{len(strangers)} shards are beyond the --limit of the run and are skipped")
    return found, hints


def _named(names: dict[str, Shard], tar: Shard) -> Shard | None:
    """Return the run's shard of this size with the longest name that the tar's path ends in."""
    stem = next((tar.url.removesuffix(ending) for ending in ENDINGS if tar.url.endswith(ending)), tar.url)
    parts = stem.split("/")
    ends = (names.get("/".join(parts[start:])) for start in range(len(parts)))
    return next((shard for shard in ends if shard is not None and shard.size == tar.size), None)


def _nearest(run: Run, tar: Shard) -> Shard | None:
    """Return the run's shard of the tar's name, else its first."""
    same = (shard for shard in run.shards if shard.url.rpartition("/")[2] == tar.url.rpartition("/")[2])
    return next(same, run.shards[0] if run.shards else None)


def move(path: str, run: Run, patterns: Sequence[str]) -> tuple[Run, frozenset[str]]:
    """Return the run with the tars that the patterns name at their present URLs, and the names of these shards.

    Raises:
        UserError: as `find_shards`.
    """
    found = find_shards(path, run, patterns)[0] if patterns else {}
    return replace(run, shards=[found.get(shard.name, shard) for shard in run.shards]), frozenset(found)


def readable(shard: Shard, given: bool) -> Shard:
    """Return the shard if its tar may be read.

    A run made by others can name any endpoint in its URLs, and reading there sends the user's credentials to it.

    Args:
        shard: the shard to read.
        given: whether the user named the tar, not run.json.

    Raises:
        ShardError: run.json names an object store by more than bucket and path.
    """
    if not given and "://" in shard.url and "?" in shard.url:
        raise ShardError(
            f"{shard.url}: the run's URL names an endpoint or options, and your credentials would go there; if you "
            "trust it, name the shards with --shards"
        )
    return shard
