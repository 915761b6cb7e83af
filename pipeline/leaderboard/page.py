"""The page of a leaderboard: the table of all methods and controls, and images under all methods."""

from collections.abc import Mapping, Sequence

from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.evaluate import Evaluation
from saltern.pipeline.metrics.table import format_estimate, head_of, lines_of, remarks, shown_columns
from saltern.pipeline.show.order import spread
from saltern.pipeline.show.page import Cell, Table
from saltern.pipeline.show.sheet import comparison
from saltern.schemas.metrics import Better, Metric


def board_page(evaluation: Evaluation, rates: Sequence[float | None], shown: int) -> str:
    """Return the page. Its images are drawn at random from all shards that were judged, by the seed of the first run.

    Args:
        evaluation: of the runs.
        rates: of each run, images a second; None if unknown.
        shown: images.
    """
    runs = [judged.run for judged in evaluation.runs]
    title = f"Leaderboard of {', '.join(dict.fromkeys(run.config.model for run in runs))}"
    return comparison(
        runs,
        chosen=spread(runs[0], shown, runs[0].config.seed, evaluation.runs[0].unread),
        title=title,
        table=board_table(evaluation, rates),
        notes=list(remarks(evaluation)),
    )


def board_table(evaluation: Evaluation, rates: Sequence[float | None]) -> Table:
    """Return the table; the best of the runs in each column is marked."""
    columns, lines = shown_columns(evaluation), lines_of(evaluation)
    best = {
        key: _best(key, metric, [found for _, found in lines[: len(evaluation.runs)]])
        for key, metric in columns.items()
    }
    rows = []
    for number, (name, found) in enumerate(lines):
        cells = [Cell(name)]
        for key, metric in columns.items():
            estimate = found.get(key)
            value = None if estimate is None or not estimate.count else estimate.value
            is_best = number < len(evaluation.runs) and value is not None and value == best[key]
            cells.append(Cell(format_estimate(estimate, metric), value, is_best))
        rate = rates[number] if number < len(rates) else None
        cells.append(Cell("-") if rate is None else Cell(f"{rate:,.1f}", rate))
        rows.append(cells)
    heads = ["", *(head_of(metric) for metric in columns.values()), "images/s"]
    hints = ["", *(metric.help for metric in columns.values()), "of one device, while it computes"]
    return Table(heads, hints, rows)


def _best(key: str, metric: Metric, lines: Sequence[Mapping[str, Estimate]]) -> float | None:
    values = [found[key].value for found in lines if key in found and found[key].count]
    if not values or metric.better is Better.NEITHER:
        return None
    return max(values) if metric.better is Better.MORE else min(values)
