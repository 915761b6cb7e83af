"""Print an evaluation: one table of all runs and controls, and lines of text."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.evaluate import Evaluation, Judged, describe, to_json
from saltern.pipeline.metrics.families import FAMILIES, option_name
from saltern.pipeline.metrics.judge import AS_IS, NO_MAPS, SCALED, maps_of
from saltern.pipeline.tables import markdown_table
from saltern.schemas.choices import Multiply
from saltern.schemas.evaluation import BAD_MASK, CENTRE, NO_MASK, WHOLE
from saltern.schemas.metrics import Better, Metric
from saltern.schemas.text import counted

_MAPS = {
    SCALED: "each map scaled from its smallest value, 0, to its largest, 1",
    AS_IS: "maps not scaled",
    NO_MAPS: "the run stores no maps (--no-map), only masks",
}
_CONTROLS = {
    "random": "random map",
    "centre-blob": "blob in the centre",
    "edges": "edge filter",
    CENTRE: "centre box of half the area",
    WHOLE: "whole image",
}
_MULTIPLY = {
    Multiply.normalised: "maps multiply the normalised image, so 0 is the mean colour",
    Multiply.pixels: "maps multiply the pixels, so 0 is black",
}
_SHOWN = 5  # number of failed samples that are printed
_NUMBERS = ("value", "low", "high", "count", "std")  # of an estimate, in a CSV file


def columns_of(evaluation: Evaluation) -> dict[str, Metric]:
    """Return the metrics of the table by name."""
    return {name: FAMILIES[family].metrics[name] for family, names in evaluation.chosen.items() for name in names}


def shown_columns(evaluation: Evaluation) -> dict[str, Metric]:
    """Return the metrics of the table that have a value in some line; all of them if none has."""
    lines = [found for _, found in lines_of(evaluation)]
    columns = columns_of(evaluation)
    return {key: metric for key, metric in columns.items() if any(_has(found, key) for found in lines)} or columns


def _has(found: Mapping[str, Estimate], key: str) -> bool:
    return key in found and found[key].count > 0


def lines_of(evaluation: Evaluation) -> list[tuple[str, dict[str, Estimate]]]:
    """Return the name and the estimates of each run and of each control."""
    names = [f"{judged.run.config.method} of {judged.run.config.model}" for judged in evaluation.runs]
    count = Counter(names)
    runs = [
        (name if count[name] == 1 else f"{name} ({judged.run.path})", judged.estimates)
        for name, judged in zip(names, evaluation.runs, strict=True)
    ]
    return runs + [(_CONTROLS[subject], found) for subject, found in evaluation.controls.items()]


def as_markdown(evaluation: Evaluation, more: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a Markdown table: means with half the width of their 95 % intervals.

    Args:
        evaluation: of some runs.
        more: further columns by title, with a cell for each run.
    """
    columns, more = shown_columns(evaluation), more or {}
    rows = []
    for number, (name, found) in enumerate(lines_of(evaluation)):
        cells = [format_estimate(found.get(key), metric) for key, metric in columns.items()]
        cells += [column[number] if number < len(column) else "-" for column in more.values()]
        rows.append([name, *cells])
    return markdown_table(["", *map(head_of, columns.values()), *more], rows)


def as_text(evaluation: Evaluation) -> str:
    """Return the table for a terminal."""
    return as_markdown(evaluation)


def as_csv(evaluation: Evaluation) -> str:
    """Return a line for each run or control and each metric, with as_json's values, not in percent.

    A metric without values has a count of 0 and empty cells.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", "metric", "better", *_NUMBERS])
    for name, found in lines_of(evaluation):
        for key, metric in columns_of(evaluation).items():
            own = (found[key].to_dict() if key in found else None) or {"count": 0}
            numbers = [own.get(number) for number in _NUMBERS]
            writer.writerow([name, option_name(key), metric.better.name.lower(), *numbers])
    return file.getvalue().rstrip("\n")


def as_json(evaluation: Evaluation) -> str:
    """Return everything as JSON; values as stored, not in percent."""
    columns = columns_of(evaluation)
    runs = [
        {
            "name": name,
            **describe(judged.run),
            **judged.census.summary(),
            "notes": judged.notes,
            "unread_shards": judged.unread,
            "metrics": to_json(judged.estimates),
        }
        for (name, _), judged in zip(lines_of(evaluation), evaluation.runs, strict=False)
    ]
    controls = {
        subject: to_json({key: own for key, own in found.items() if key.partition("@")[0] in columns})
        for subject, found in evaluation.controls.items()
    }
    better: dict[str, Any] = {key: metric.better.name.lower() for key, metric in columns.items()}
    said = list(remarks(evaluation))
    return json.dumps({"better": better, "runs": runs, "controls": controls, "remarks": said}, indent=1)


def head_of(metric: Metric) -> str:
    """Return a metric's title with an arrow to its better values."""
    return f"{metric.title} {metric.better.value}".rstrip()


def format_estimate(estimate: Estimate | None, metric: Metric) -> str:
    """Return the mean with half the width of its 95 % interval."""
    if estimate is None or not estimate.count:
        return "-"
    if metric.percent:
        return f"{100 * estimate.value:.1f} ± {100 * estimate.plus_minus:.1f}"
    return f"{estimate.value:.3f} ± {estimate.plus_minus:.3f}"


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """Yield lines on which samples the table covers and how its numbers were computed."""
    marks = {metric.better for metric in columns_of(evaluation).values()}
    meaning = {Better.LESS: "↓ less is better", Better.MORE: "↑ more is better"}
    yield "; ".join([*(text for mark, text in meaning.items() if mark in marks), "± half the 95 % bootstrap interval"])
    shown = shown_columns(evaluation)
    empty = [metric.title for key, metric in columns_of(evaluation).items() if key not in shown]
    if empty:
        yield f"no sample has a value of {', '.join(empty)}"
    if evaluation.multiply is not None:
        yield _MULTIPLY[Multiply(evaluation.multiply)]
    if "max-box" in evaluation.chosen:
        yield "MaxBoxAcc: at the best thresholds of these samples, which is an oracle's choice"
    if evaluation.unread:
        name = next(iter(evaluation.unread))
        yield f"left out: {counted(len(evaluation.unread), 'shard')} that could not be read, the first {name}"
    yield from _merged(evaluation, [list(_of_run(judged, evaluation)) for judged in evaluation.runs])


def notes(evaluation: Evaluation) -> Iterator[str]:
    """Yield the notes for the user."""
    yield from _merged(evaluation, [judged.notes for judged in evaluation.runs])


def _merged(evaluation: Evaluation, said: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield each line once: as it is if it is about all runs, else with the paths of its runs."""
    paths = [judged.run.path for judged in evaluation.runs]
    for line in dict.fromkeys(line for lines in said for line in lines):
        own = [path for path, lines in zip(paths, said, strict=True) if line in lines]
        others = [path for path in paths if path not in own]
        if not others:
            yield line
        elif len(others) < len(own):
            yield f"all but {', '.join(others)}: {line}"
        else:
            yield f"{', '.join(own)}: {line}"


def _of_run(judged: Judged, evaluation: Evaluation) -> Iterator[str]:
    """Yield the lines about one run."""
    config, census = judged.run.config, judged.census
    boxes = " with boxes" if "localization" in evaluation.chosen else ""
    yield (f"{counted(census.judged, 'sample')}{boxes}; target {config.target.text}, masks by {config.discretize.text}")
    if "f1" in columns_of(evaluation):
        yield f"F1: {_MAPS[maps_of(config)]}"
    if config.target.kind == "top" and config.target.number > 1:
        yield "samples with several targets: the first target counts"
    yield from _skipped(census)


def _skipped(census: Census) -> Iterator[str]:
    what = "pixel masks" if census.statuses[NO_MASK] or census.statuses[BAD_MASK] else "boxes"
    if census.missing:
        yield f"skipped: {counted(census.missing, 'sample')} without {what}"
    if census.unreadable:
        place, reason = next(iter(census.bad.items()))
        bad = counted(census.unreadable, "sample")
        yield f"skipped: {bad} whose {what} cannot be read, the first {place}: {reason}"
    if census.other_size:
        yield f"{census.other_size:,} samples were annotated at another size: were their images rescaled?"
    for place, reason in list(census.failed.items())[:_SHOWN]:
        yield f"failed in the run: {place}: {reason}"
    if census.failures > _SHOWN:
        yield f"{census.failures - _SHOWN:,} more failed in the run; the Parquet files in RUN/metrics name them"
