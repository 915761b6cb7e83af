"""Give a page the metrics in RUN/metrics: of each image, and the run's means."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from saltern.pipeline.runs.measured import Measured, Place, sample_values
from saltern.pipeline.runs.reader import Row
from saltern.pipeline.show.order import metrics_of, order_of
from saltern.pipeline.show.page import Order
from saltern.schemas.metrics import METRICS, Metric


def numbered(measured: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return an image's metrics as facts of its card."""
    return [(title, f"{value:.3g}") for title, value in measured.items()]


def titled(found: Sequence[Measured], rows: Iterable[Row]) -> dict[Place, dict[str, float]]:
    """Return the metrics of the rows' samples by title."""
    own, metrics = sample_values(found, ((row.shard, row.index) for row in rows)), metrics_of(found)
    return {
        place: {metric.title: values[name] * _scale(metric) for name, metric in metrics.items() if name in values}
        for place, values in own.items()
    }


def means(found: Sequence[Sequence[Measured]], rows: Collection[Row]) -> dict[Place, dict[str, float]]:
    """Return the mean over the runs of each metric that all have, by title."""
    each = [titled(own, rows) for own in found]
    common = set.intersection(*(set(orders([own])) for own in found))
    return {
        place: {
            title: float(np.mean([own[place][title] for own in each if title in own.get(place, {})]))
            for title in values
            if title in common
        }
        for place, values in each[0].items()
    }


def orders(found: Sequence[Sequence[Measured]]) -> dict[str, Order]:
    """Return how each metric sorts, by title."""
    return {metric.title: order_of(metric) for own in found for metric in metrics_of(own).values()}


def estimates(found: Sequence[Measured]) -> list[tuple[str, str]]:
    """Return the means of each family's metrics with their 95 % intervals, for the page's header."""
    facts = []
    for one in found:
        texts = [_estimate(METRICS[one.family][name], own) for name, own in one.summary.items()]
        facts += [(one.family, "; ".join(texts))] if texts else []
    return facts


def _estimate(metric: Metric, own: Mapping[str, float]) -> str:
    value, low, high = (own[name] * _scale(metric) for name in ("value", "low", "high"))
    return f"{metric.title} {value:.3g} ({low:.3g} to {high:.3g}) of {own['count']:,.0f}"


def _scale(metric: Metric) -> int:
    return 100 if metric.percent else 1
