"""Runs as a contact sheet: for each row of one the photograph, the map over it, the mask and its box; of several runs,
for each image the maps side by side.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc

from saltern.pipeline.runs.reader import Row, SaliencyRun
from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.pipeline.show.page import Card, Picture, View, render
from saltern.pipeline.show.thumbnails import encode, given_boxes, overlay, photograph, pictures
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK, table_schema

_SORTS = [
    field.name for field in table_schema(None) if pa.types.is_integer(field.type) or pa.types.is_float32(field.type)
]
_CAPTION = 24  # characters of an option under a picture
_NOTE = "Signed maps are coloured from 0 up."
_VALUES = ("score", "mask_area", "label", "predicted", "target", "index")


def contact_sheet(run: SaliencyRun, sort: str | None = None, limit: int = 48) -> str:
    """An HTML page of the first `limit` rows, in shard order or, lowest first, by a column.

    Reads of each shard that it shows what lies before the last wanted sample. Where a shard cannot be read, its rows
    are shown without their image, and the page says so.

    Raises:
        UserError: no such column, or one that has no order.
        ShardError: a data file is gone, cut or of another run.
    """
    order, numbers = _order(run, sort), _choose(run, sort, limit)
    found = {number: run.at(number) for number in sorted(numbers)}  # neighbours are read together
    samples, names, gone = _samples(run, found.values())
    cards = [_card(found[number], samples.get((found[number].shard, found[number].index)), names) for number in numbers]
    counts = f"{len(cards):,} of {len(run):,} rows, {order}"
    config = run.run.config
    title = f"{config.method} of {config.model}"
    return render(title, [*_provenance(run), ("shown", counts)], [_NOTE, *gone], cards)


def comparison(runs: Sequence[SaliencyRun], sort: str | None = None, limit: int = 48) -> str:
    """An HTML page of images, each under the maps of several runs side by side.

    The rows are those of the first run, chosen and ordered as in `contact_sheet`; of another run the row of the same
    shard (else of the same key alone) and target is shown, or its first.

    Raises:
        UserError: no such column; runs that share no sample; two runs that nothing tells apart.
        ShardError: a data file is gone, cut or of another run.
    """
    first, others = runs[0], runs[1:]
    captions = _captions(runs)
    order, numbers = _order(first, sort), _choose(first, sort, limit)
    found = {number: first.at(number) for number in sorted(numbers)}
    samples, names, gone = _samples(first, found.values())
    cards, matches = [], 0
    for row in (found[number] for number in numbers):
        beside = [_same(row, run) for run in others]
        matches += sum(other is not None for other in beside)
        sample = samples.get((row.shard, row.index))
        cards.append(_wide_card(row, sample, dict(zip(captions, [row, *beside], strict=True)), names))
    if cards and not matches:
        raise UserError(f"{first.path} shares no sample with {', '.join(run.path for run in others)}")
    facts = [(caption, _in_short(run)) for caption, run in zip(captions, runs, strict=True)]
    shown = ("shown", f"{len(cards):,} of {len(first):,} rows, {order}")
    return render(" | ".join(captions), [*facts, shown], [_NOTE, *gone], cards)


def _same(row: Row, run: SaliencyRun) -> Row | None:
    rows = run.rows(row.key, row.shard) or run.rows(row.key)
    return next((other for other in rows if other.target == row.target), rows[0] if rows else None)


def _captions(runs: Sequence[SaliencyRun]) -> list[str]:
    """What tells each run from the others: its method; where several have it, its layer, model or options too."""
    tries = [
        [run.run.config.method for run in runs],
        [" ".join([run.run.config.method, *run.run.config.layer]) for run in runs],
        [" ".join([run.run.config.method, *run.run.config.layer, run.run.config.model]) for run in runs],
        [f"{run.run.config.method} {_options(run, _CAPTION)}" for run in runs],
        [f"{run.run.config.method} {run.path}" for run in runs],
    ]
    alone = [Counter(names) for names in tries]
    found = []
    for number in range(len(runs)):
        free = (names[number] for names, counts in zip(tries, alone, strict=True) if counts[names[number]] == 1)
        found.append(next(free, ""))
    if "" in found:
        raise UserError(f"{runs[found.index('')].path} is given twice")
    return found


def _in_short(run: SaliencyRun) -> str:
    config = run.run.config
    return ", ".join(filter(None, [run.path, config.model, *config.layer, _options(run), run.run.fingerprint]))


def _options(run: SaliencyRun, length: int | None = None) -> str:
    """All of them; of values longer than `length` the end, which tells one file or digest from another."""
    shown = {name: str(value) for name, value in run.run.config.options.items()}
    if length is not None:
        shown = {name: text if len(text) <= length else f"...{text[-length:]}" for name, text in shown.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _wide_card(row: Row, sample: Sample | None, rows: dict[str, Row | None], names: dict[int, str]) -> Card:
    """The photograph, then what each run has of it."""
    photo_YX3 = photograph(row, sample)
    facts = _facts(row, names)
    made = []
    if photo_YX3 is not None:
        made.append(encode(photo_YX3, f"{row.key}, {facts.get('label', '')}", given_boxes(sample, row), "photograph"))
        height, width = photo_YX3.shape[:2]
        for caption, other in rows.items():
            drawn = None if other is None else overlay(other, photo_YX3, caption)
            why = "not in this run" if other is None else other.error or other.status
            made.append(drawn or Picture(b"", width, height, why, (), caption))
    shown = [(name, facts[name]) for name in ("label", "predicted", "target", "score", "size") if name in facts]
    values = {name: getattr(row, name) for name in _VALUES}
    return Card(row.key, row.shard, row.status, [View(made, shown, _trouble(row, sample))], values)


def _order(run: SaliencyRun, sort: str | None) -> str:
    if sort is None:
        return "in shard order"
    if sort == "status":
        return "sorted by status, failed rows first"
    if sort in _SORTS:
        return f"sorted by {sort}, lowest first, rows without one last"
    raise UserError(f"--sort {sort!r} is no column to sort by; these are: {', '.join(sorted([*_SORTS, 'status']))}")


def _choose(run: SaliencyRun, sort: str | None, limit: int) -> list[int]:
    """Numbers of the rows to show, in their order."""
    if sort is None or not len(run):
        return list(range(min(limit, len(run))))
    column = run.columns(sort)[sort]
    if sort == "status":
        # ok comes last, the others by name.
        column = pc.if_else(pc.equal(column, OK), pa.scalar(None, pa.string()), column)
    order: list[int] = pc.sort_indices(column)[:limit].to_pylist()
    return order


def _samples(run: SaliencyRun, rows: Iterable[Row]) -> tuple[dict[tuple[str, int], Sample], dict[int, str], list[str]]:
    """The rows' samples by (shard, index), class names as far as they were met, and what could not be read."""
    samples: dict[tuple[str, int], Sample] = {}
    names = dict(enumerate(run.run.class_names or []))
    gone: list[str] = []
    shards = {shard.name: shard for shard in run.shards}
    for name, group in groupby(rows, lambda row: row.shard):
        keys = {row.index: row.key for row in group}
        try:
            for sample in _read(shards[name], keys, names):
                samples[name, sample.index] = sample
        except (OSError, ShardError) as error:
            gone.append(f"{name}: shown without its images, which cannot be read ({error})")
    return samples, names, gone


def _read(shard: Shard, keys: dict[int, str], names: dict[int, str]) -> Iterable[Sample]:
    last = max(keys)
    for sample in read_samples(shard):
        name = extra(sample).get("name")
        if sample.label is not None and isinstance(name, str):
            names[sample.label] = name
        if sample.index in keys:
            if sample.key != keys[sample.index]:
                raise ShardError(f"it has {sample.key!r} where the run has {keys[sample.index]!r}")
            yield sample
        if sample.index == last:
            return


def _provenance(run: SaliencyRun) -> list[tuple[str, str]]:
    config = run.run.config
    statuses: dict[str, int] = {}
    for receipt in run.receipts:
        for status, count in receipt.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    shape = f"squashed to {config.crop}" if config.squash else f"shorter side {config.resize}, crop {config.crop}"
    facts = {
        "run": run.path,
        "model": f"{config.model} (weights {config.weights}, {config.weights_digest[:12]})",
        "method": f"{config.method} {_options(run)}",
        "layer": ", ".join(config.layer),
        "target": config.target,
        "preprocess": f"{shape}, {config.interpolation}, mean {_numbers(config.mean)}, std {_numbers(config.std)}",
        "masks": config.discretize,
        "maps": f"{config.map_size}, {config.map_dtype}" if config.save_map else "not stored",
        "precision": config.precision,
        "shards": f"{len(run.shards):,} of {len(run.run.shards):,} done",
        "rows": ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items())),
        "fingerprint": run.run.fingerprint,
        "made with": ", ".join(f"{name} {version}" for name, version in run.run.versions.items()),
    }
    return [(name, value) for name, value in facts.items() if value]


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _card(row: Row, sample: Sample | None, names: dict[int, str]) -> Card:
    values = {name: getattr(row, name) for name in _VALUES}
    return Card(row.key, row.shard, row.status, [_view(row, sample, names)], values)


def _view(row: Row, sample: Sample | None, names: dict[int, str]) -> View:
    facts = _facts(row, names)
    shown = pictures(row, sample, {"target": "", "label": "", "mask": "", "box": ""} | facts)
    return View(shown, list(facts.items()), _trouble(row, sample))


def _facts(row: Row, names: dict[int, str]) -> dict[str, str]:
    def named(label: int | None) -> str:
        return "" if label is None else f"{label} {names.get(label, '')}".strip()

    facts = {
        "label": named(row.label),
        "predicted": named(row.predicted),
        "target": named(row.target),
        "score": "" if row.score is None else f"{row.score:.3f}",
        "mask": "" if row.mask_area is None else f"{100 * row.mask_area:.1f} %",
        "box": "; ".join(" ".join(map(str, box)) for box in row.boxes or ()),
        "size": "" if row.image_width is None else f"{row.image_width} x {row.image_height}",
    }
    return {name: fact for name, fact in facts.items() if fact}


def _trouble(row: Row, sample: Sample | None) -> str:
    trouble = row.error or ""
    if row.image_width is not None and sample is None:
        trouble = f"{trouble} the image cannot be read".strip()
    return trouble
