"""An evaluation as a table and lines of text."""

from collections.abc import Iterator

from saltern.pipeline.metrics.evaluate import Evaluation, Mean
from saltern.pipeline.metrics.judge import AS_IS, CENTRE, FOUND, NO_MAPS, SCALED, WHOLE
from saltern.schemas.saliency import OK, ZERO_MAP

_HEADS = {"le": "LE %", "om": "OM %", "f1": "F1 %", "f1_mask": "F1 % of the mask"}
_MAPS = {
    SCALED: "each map scaled from its least value, 0, to its largest, 1",
    AS_IS: "maps as they are",
    NO_MAPS: "the run stores no maps (--no-map), masks alone",
}
_SHOWN = 5  # failed samples that are printed


def as_table(found: Evaluation) -> str:
    """A Markdown table: the run, then the baselines; means with half their 95 % intervals."""
    config = found.run.run.config
    names = {FOUND: f"{config.method} of {config.model}", CENTRE: "centre box of half the area", WHOLE: "whole image"}
    lines = [["", *(_HEADS[column] for column in found.columns)]]
    lines += [[name, *map(_cell, found.means[subject].values())] for subject, name in names.items()]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def _cell(mean: Mean) -> str:
    percent = mean.percent()
    return "-" if percent is None else f"{percent['value']:.1f} ± {percent['plus_minus']:.1f}"


def remarks(found: Evaluation) -> Iterator[str]:
    """What the table is over, and how its numbers were made; one line each."""
    config = found.run.run.config
    yield (
        f"{found.samples:,} samples with boxes; target {config.target}, boxes of the masks by {config.discretize}; "
        "± half the 95 % interval"
    )
    if "f1" in found.columns:
        yield f"F1: {_MAPS[found.maps]}"
    if found.several:
        yield "samples with several targets: the first of each counts"
    if found.without_boxes:
        yield f"left out: {found.without_boxes:,} samples without boxes"
    if found.bad_annotations:
        place, reason = next(iter(found.first_bad.items()))
        yield f"left out: {found.bad_annotations:,} samples whose boxes cannot be read, the first {place}: {reason}"
    if found.other_size:
        yield f"{found.other_size:,} samples were annotated at another size than their images have: are they rescaled?"
    yield from _failed(found)


def _failed(found: Evaluation) -> Iterator[str]:
    count = sum(count for status, count in found.statuses.items() if status not in (OK, ZERO_MAP))
    for place, reason in list(found.first_failed.items())[:_SHOWN]:
        yield f"counts as a miss: {place}: {reason}"
    if count > _SHOWN:
        yield f"{count - _SHOWN:,} more count as misses; RUN/metrics/localization.json and the Parquet files name them"
