"""Choose and order the rows of a page: by a column of the run, by a metric in RUN/metrics, or at random.

Shape suffixes: S shards, P drawn rows.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saltern.pipeline.runs.measured import Measured, column
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.show.page import Order
from saltern.schemas.errors import UserError
from saltern.schemas.metrics import Better, Metric
from saltern.schemas.saliency import OK, table_schema

COLUMNS = [
    field.name for field in table_schema(None) if pa.types.is_integer(field.type) or pa.types.is_float32(field.type)
]


def choose(run: SaliencyRun, found: Sequence[Measured], sort: str | None, limit: int) -> tuple[str, list[int]]:
    """Return the order in words, and the numbers of the first `limit` rows in it.

    Raises:
        UserError: neither a column with an order nor a metric that was measured.
        ShardError: a data file is missing, cut or of another run.
    """
    if sort is None:
        return "in shard order", list(range(min(limit, len(run))))
    if sort == "status":
        # Nulls are sorted last: ok after all others.
        values = pc.if_else(pc.equal(run.columns(sort)[sort], OK), None, run.columns(sort)[sort]) if len(run) else []
        return "sorted by status, failed rows first", _first(values, limit)
    if sort in COLUMNS:
        values = run.columns(sort)[sort] if len(run) else []
        return f"sorted by {sort}, lowest first, rows without a value last", _first(values, limit)
    name = sort.replace("-", "_")
    for one in found:
        if name in one.metrics:
            metric = one.metrics[name]
            values = column(run, one, name) * (-1 if order_of(metric).falling else 1)
            words = f"sorted by {metric.title}, {_first_words(metric)}, rows without a value last"
            return words, _first(pa.array(values, from_pandas=True), limit)  # NaN is no value
    valued = [name for one in found for name in one.metrics if name in one.summary or not one.summary]
    known = ", ".join(sorted({*COLUMNS, "status", *(name.replace("_", "-") for name in valued)}))
    raise UserError(
        f"--sort {sort!r} has no order here; choose one of {known}, or a metric that `saltern evaluate {run.path} "
        "--metric NAME` measures first"
    )


def spread(run: SaliencyRun, limit: int, seed: int, without: Collection[str] = ()) -> tuple[str, list[int]]:
    """Return how rows were drawn, and their numbers: a random one of each of `limit` equal parts of the run.

    Args:
        run: whose rows are counted in shard order.
        limit: rows.
        seed: of the draw, which depends on nothing else but the numbers of rows.
        without: names of shards that have none of them.
    """
    rows_S = np.array([receipt.rows for receipt in run.receipts], np.int64)
    usable_S = np.where([shard.name in without for shard in run.shards], 0, rows_S)
    count = int(usable_S.sum())
    if count <= limit:
        words, drawn_P = "all that were judged", np.arange(count)
    else:
        words = f"a random one of each of {limit} equal parts of the shards (seed {seed})"
        edges = [part * count // limit for part in range(limit + 1)]
        drawn_P = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
    shard_P = np.searchsorted(usable_S.cumsum(), drawn_P, "right")
    before_S, used_S = rows_S.cumsum() - rows_S, usable_S.cumsum() - usable_S
    numbers: list[int] = (before_S[shard_P] + drawn_P - used_S[shard_P]).tolist()
    return words, numbers


def metrics_of(found: Iterable[Measured]) -> dict[str, Metric]:
    """Return the metrics that have a value for each sample, but for those that are columns of the run."""
    return {name: metric for one in found for name, metric in one.metrics.items() if name not in COLUMNS}


def order_of(metric: Metric) -> Order:
    """Return the order that puts a metric's worst values first; of a metric that is neither, the lowest."""
    return Order(metric.better is Better.LESS, f"{metric.help}; {_first_words(metric)}")


def _first_words(metric: Metric) -> str:
    return "lowest first" if metric.better is Better.NEITHER else "worst first"


def _first(values: pa.ChunkedArray | pa.Array | list[object], limit: int) -> list[int]:
    order: list[int] = pc.sort_indices(values)[:limit].to_pylist() if len(values) else []
    return order
