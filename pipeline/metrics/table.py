"""Print an evaluation as a table and lines of text."""

from collections.abc import Iterator

from saltern.pipeline.metrics.evaluate import Evaluation, Mean
from saltern.pipeline.metrics.judge import AS_IS, CENTRE, FOUND, NO_MAPS, SCALED, WHOLE
from saltern.pipeline.tables import markdown_table
from saltern.schemas.saliency import OK, ZERO_MAP
from saltern.schemas.text import counted

_HEADS = {"le": "LE %", "om": "OM %", "f1": "F1 %", "f1_mask": "F1 % of the mask"}
_MAPS = {
    SCALED: "each map scaled from its smallest value, 0, to its largest, 1",
    AS_IS: "maps not scaled",
    NO_MAPS: "the run stores no maps (--no-map), only masks",
}
_SHOWN = 5  # number of failed samples that are printed


def as_table(evaluation: Evaluation) -> str:
    """Return a Markdown table of the run and the baselines: means with half their 95 % intervals."""
    config = evaluation.run.config
    names = {FOUND: f"{config.method} of {config.model}", CENTRE: "centre box of half the area", WHOLE: "whole image"}
    rows = [[name, *map(_cell, evaluation.means[subject].values())] for subject, name in names.items()]
    return markdown_table(["", *(_HEADS[column] for column in evaluation.columns)], rows)


def _cell(mean: Mean) -> str:
    percent = mean.percent()
    return "-" if percent is None else f"{percent['value']:.1f} ± {percent['plus_minus']:.1f}"


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """Yield lines on which samples the table covers and how its numbers were computed."""
    config = evaluation.run.config
    yield (
        f"{counted(evaluation.samples, 'sample')} with boxes; target {config.target.text}, "
        f"boxes of the masks by {config.discretize.text}; ± half the 95 % interval"
    )
    if "f1" in evaluation.columns:
        yield f"F1: {_MAPS[evaluation.maps]}"
    if evaluation.several:
        yield "samples with several targets: the first target counts"
    if evaluation.without_boxes:
        yield f"skipped: {counted(evaluation.without_boxes, 'sample')} without boxes"
    if evaluation.bad_annotations:
        place, reason = next(iter(evaluation.first_bad.items()))
        bad = counted(evaluation.bad_annotations, "sample")
        yield f"skipped: {bad} whose boxes cannot be read, the first {place}: {reason}"
    if evaluation.other_size:
        yield f"{evaluation.other_size:,} samples were annotated at another size: were their images rescaled?"
    yield from _failed(evaluation)


def _failed(evaluation: Evaluation) -> Iterator[str]:
    count = sum(count for status, count in evaluation.statuses.items() if status not in (OK, ZERO_MAP))
    for place, reason in list(evaluation.first_failed.items())[:_SHOWN]:
        yield f"counts as a miss: {place}: {reason}"
    if count > _SHOWN:
        yield f"{count - _SHOWN:,} more count as misses; RUN/metrics/localization.json and the Parquet files name them"
