"""Choose and order the rows of a page, by a column of the run or by a metric in RUN/metrics."""

from collections.abc import Iterable, Sequence

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
    known = ", ".join(sorted({*COLUMNS, "status", *(name.replace("_", "-") for name in metrics_of(found))}))
    raise UserError(
        f"--sort {sort!r} has no order here; choose one of {known}, or a metric that `saltern evaluate {run.path} "
        "--metric NAME` measures first"
    )


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
