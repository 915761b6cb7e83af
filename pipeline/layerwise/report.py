"""Write a comparison of layers: a table, JSON and a plot."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.evaluate import Evaluation, describe, to_json
from saltern.pipeline.metrics.table import columns_of, format_estimate, head_of, remarks, shown_columns
from saltern.pipeline.storage.store import Store
from saltern.pipeline.tables import markdown_table
from saltern.schemas.errors import UserError
from saltern.schemas.metrics import Metric

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = (":", "--", "-.", (0, (1, 4)), (0, (6, 3)))
_WIDE = 3  # panels in a row of the plot


@dataclass(frozen=True)
class Line:
    """A method at a layer."""

    method: str
    layer: str
    run: str  # folder or URL


@dataclass(frozen=True)
class Comparison:
    """The judged runs of `layers`."""

    model: str
    layers: Sequence[str]
    methods: Sequence[str]
    lines: Sequence[Line]
    evaluation: Evaluation  # its runs are in the order of the lines


def as_markdown(comparison: Comparison) -> str:
    """Return a Markdown table: a row for each method and layer, and for each control; a column for each metric."""
    columns = shown_columns(comparison.evaluation)
    pairs = zip(comparison.lines, comparison.evaluation.runs, strict=True)
    rows = [[line.method, line.layer, *_cells(judged.estimates, columns)] for line, judged in pairs]
    rows += [[subject, "", *_cells(found, columns)] for subject, found in comparison.evaluation.controls.items()]
    return markdown_table(["method", "layer", *map(head_of, columns.values())], rows)


def _cells(found: dict[str, Estimate], columns: dict[str, Metric]) -> Iterator[str]:
    return (format_estimate(found.get(key), metric) for key, metric in columns.items())


def as_json(comparison: Comparison) -> str:
    """Return everything as JSON; values as stored, not in percent."""
    columns, found = columns_of(comparison.evaluation), comparison.evaluation
    runs: list[dict[str, Any]] = [
        {**describe(judged.run), "layer": line.layer, "metrics": to_json(judged.estimates)}
        for line, judged in zip(comparison.lines, found.runs, strict=True)
    ]
    head = {"model": comparison.model, "methods": list(comparison.methods), "layers": list(comparison.layers)}
    better = {key: metric.better.name.lower() for key, metric in columns.items()}
    controls = {subject: to_json(own) for subject, own in found.controls.items()}
    return json.dumps({**head, "better": better, "runs": runs, "controls": controls}, indent=1)


def write_report(comparison: Comparison, store: Store) -> None:
    """Write layers.json, layers.md and layers.png. Raises UserError if the folder cannot be written to."""
    text = "\n".join([as_markdown(comparison), "", *(f"- {line}" for line in remarks(comparison.evaluation)), ""])
    for name, content in (("json", as_json(comparison).encode()), ("md", text.encode()), ("png", draw(comparison))):
        try:
            store.write(f"layers.{name}", content)
        except OSError as error:
            raise UserError(f"--out: layers.{name} cannot be written: {error}") from error


def draw(comparison: Comparison) -> bytes:
    """Return a PNG: a panel for each metric, layers from left to right, a curve for each method, controls in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the import takes a second
    from matplotlib.figure import Figure

    columns = shown_columns(comparison.evaluation)
    wide, high = min(_WIDE, len(columns)), -(-len(columns) // _WIDE)
    figure = Figure(figsize=(4 * wide + 2, 3.5 * high), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(high, wide, squeeze=False).flat)
    for panel, (key, metric) in zip(panels, columns.items(), strict=False):
        _panel(panel, comparison, key, metric)
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _panel(panel: Any, comparison: Comparison, key: str, metric: Metric) -> None:
    """Draw one metric."""
    unit, found = 100 if metric.percent else 1, comparison.evaluation
    of = {(line.method, line.layer): own.estimates for line, own in zip(comparison.lines, found.runs, strict=True)}
    for number, method in enumerate(comparison.methods):
        each = [of[method, layer].get(key) for layer in comparison.layers]
        there = [(at, one) for at, one in enumerate(each) if one is not None and one.count]
        panel.errorbar(
            [at for at, _ in there],
            [unit * one.value for _, one in there],
            [
                [unit * max(one.value - one.low, 0) for _, one in there],
                [unit * (one.high - one.value) for _, one in there],
            ],
            fmt="o-",
            color=_COLOURS[number % len(_COLOURS)],
            capsize=2,
            label=method,
        )
    for style, (subject, estimates) in zip(_STYLES, found.controls.items(), strict=False):
        own = estimates.get(key)
        if own is not None and own.count:
            panel.axhline(unit * own.value, color="#777777", linestyle=style, linewidth=1, label=f"control: {subject}")
    panel.set_title(head_of(metric), fontsize="medium")
    panel.set_xticks(range(len(comparison.layers)), comparison.layers, rotation=20, ha="right")
    panel.grid(axis="y", alpha=0.3)
