"""Sum up the results of a family of metrics, in one pass over their data files."""

from saltern.pipeline.engine.derived import Derived
from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.family import Family
from saltern.pipeline.metrics.subjects import read_subjects


def summarise(family: type[Family], results: Derived, census: Census | None = None) -> dict[str, dict[str, Estimate]]:
    """Return the estimate of each metric by subject. Each data file is read once, and no row is kept.

    Args:
        family: of the results.
        results: of the shards that count.
        census: counts the same rows; None: nothing is counted.

    Raises:
        ShardError, UserError: as `read_subjects`.
    """
    summary = family.summary(results.store)
    columns = list(dict.fromkeys([*summary.columns, *(census.columns if census is not None else ())]))
    for shard, subject, rows in read_subjects(results, columns):
        summary.add(subject, rows)
        if census is not None:
            census.add(shard, rows)
    return summary.estimates()
