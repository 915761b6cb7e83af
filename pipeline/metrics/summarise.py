"""Sum up the results of a family of metrics, in one pass over their data files."""

from collections.abc import Sequence

from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.family import Family
from saltern.pipeline.metrics.subjects import read_subjects
from saltern.pipeline.storage.store import Store
from saltern.schemas.run import Shard


def summarise(
    family: type[Family], store: Store, shards: Sequence[Shard], census: Census | None = None
) -> dict[str, dict[str, Estimate]]:
    """Return the estimate of each metric by subject. Each data file is read once, and no row is kept.

    Args:
        family: of the results.
        store: of the results.
        shards: that are done.
        census: counts the same rows; None: nothing is counted.

    Raises:
        ShardError, UserError: as `read_subjects`.
    """
    summary = family.summary(store)
    columns = list(dict.fromkeys([*summary.columns, *(census.columns if census is not None else ())]))
    for shard, subject, rows in read_subjects(store, shards, columns):
        summary.add(subject, rows)
        if census is not None:
            census.add(shard, rows)
    return summary.estimates()
