"""Render runs as an HTML page.

For one run, each row's photograph, map, mask and box; for several runs, each image's maps side by side.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from saltern.pipeline.runs.agreement import label_doubt, measure_agreement
from saltern.pipeline.runs.measured import read_measured
from saltern.pipeline.runs.reader import Row, SaliencyRun
from saltern.pipeline.shards.annotations import extra
from saltern.pipeline.shards.samples import Sample, read_samples
from saltern.pipeline.show.figures import estimates, means, numbered, orders, titled
from saltern.pipeline.show.order import choose
from saltern.pipeline.show.page import Card, Picture, Table, View, render
from saltern.pipeline.show.thumbnails import encode, given_boxes, overlay, photograph, pictures
from saltern.pipeline.storage.ahead import read_ahead
from saltern.schemas.config import ExtractConfig
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard

_CAPTION = 24  # longest option in a caption, characters
_NOTE = "Signed maps are coloured from 0 up."
_MEAN = "An image's metrics are means over the runs."
_VALUES = ("score", "mask_area", "label", "predicted", "target", "index")


def contact_sheet(run: SaliencyRun, sort: str | None = None, limit: int = 48) -> str:
    """Return an HTML page of the first `limit` rows, in shard order or sorted.

    They are sorted by a column of the run, lowest first, or by a metric that RUN/metrics has, worst first.

    Each shown shard is read up to its last wanted sample. If a shard cannot be read, its rows are shown without images,
    and the page says so.

    Raises:
        UserError: the column does not exist or has no order.
        ShardError: a data file is missing, cut or of another run.
    """
    found = read_measured(run)
    order, numbers = choose(run, found, sort, limit)
    rows = {number: run.at(number) for number in sorted(numbers)}  # sorted, as neighbours are read together
    samples, names, problems = _samples(run, rows.values())
    measured = titled(found, rows.values())
    cards = [
        _card(row, samples.get((row.shard, row.index)), names, measured.get((row.shard, row.index), {}))
        for row in map(rows.__getitem__, numbers)
    ]
    counts = f"{len(cards):,} of {len(run):,} rows, {order}"
    config = run.config
    title = f"{config.method} of {config.model}"
    notes = [*_doubts([run]), *_signed(rows.values()), *problems]
    facts = [*_provenance(run), *estimates(found), ("shown", counts)]
    return render(title, facts, notes, cards, orders=orders([found]))


def comparison(
    runs: Sequence[SaliencyRun],
    sort: str | None = None,
    limit: int = 48,
    *,
    chosen: tuple[str, list[int]] | None = None,
    title: str | None = None,
    table: Table | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return an HTML page of images, each with the maps of several runs side by side.

    The rows are those of the first run, chosen and sorted as in `contact_sheet`. Another run shows its row of the same
    key, shard and target. Without one it shows its first row of the same key and shard, or else of the same key.
    Metrics that all runs have are shown as the mean over the runs; `sort` takes that of the first.

    Args:
        runs: the first decides the rows.
        sort, limit: as in `contact_sheet`.
        chosen: in their place, how rows of the first run were chosen, and their numbers.
        title: of the page; None = the names of the runs.
        table: above the images.
        notes: lines for the reader.

    Raises:
        UserError: the column does not exist; the runs share no sample; a run is given twice.
        ShardError: a data file is missing, cut or of another run.
    """
    first, others = runs[0], runs[1:]
    captions = _captions(runs)
    found = [read_measured(run) for run in runs]
    order, numbers = chosen or choose(first, found[0], sort, limit)
    rows = {number: first.at(number) for number in sorted(numbers)}
    samples, names, problems = _samples(first, rows.values())
    # Each run keeps its own neighbours in memory, so one thread reads it.
    others_at = list(read_ahead(lambda run: {number: _same(row, run) for number, row in rows.items()}, others))
    cards, matches = [], 0
    measured = means(found, rows.values())
    signed: list[str] = []
    for number in numbers:
        row, matching = rows[number], [own[number] for own in others_at]
        matches += sum(other is not None for other in matching)
        sample = samples.get((row.shard, row.index))
        signed = signed or _signed([row, *filter(None, matching)])
        own = measured.get((row.shard, row.index), {})
        cards.append(_wide_card(row, sample, dict(zip(captions, [row, *matching], strict=True)), names, own))
    if cards and others and not matches:
        raise UserError(f"{first.path} shares no sample with {', '.join(run.path for run in others)}")
    facts = [(caption, _in_short(run)) for caption, run in zip(captions, runs, strict=True)]
    each = [_provenance(run) for run in runs]
    facts += [fact for fact in each[0] if all(fact in own for own in each)]
    shown = ("shown", f"{len(cards):,} of {len(first):,} rows, {order}")
    said = [*notes, *([_MEAN] if any(measured.values()) else []), *_doubts(runs), *signed, *problems]
    return render(title or " | ".join(captions), [*facts, shown], said, cards, table, orders(found))


def _signed(rows: Iterable[Row]) -> list[str]:
    """Return the note on signed maps if one of the rows has one."""
    return [_NOTE] if any(row.map_bytes is not None and row.map().min() < 0 for row in rows) else []


def _doubts(runs: Sequence[SaliencyRun]) -> list[str]:
    doubts = ((run.path, label_doubt(run.store, run.run, {shard.name for shard in run.shards})) for run in runs)
    return [f"WARNING: {path}: {doubt}" for path, doubt in doubts if doubt]


@dataclass
class _Names:
    """Two tables of class names by number: those of the dataset, for labels, and those of the model."""

    dataset: dict[int, str]
    model: dict[int, str]


def _samples(run: SaliencyRun, rows: Iterable[Row]) -> tuple[dict[tuple[str, int], Sample], _Names, list[str]]:
    """Return the rows' samples by (shard, index), the names of classes, and notes on unreadable shards."""
    samples: dict[tuple[str, int], Sample] = {}
    names = _Names({}, dict(enumerate(run.run.class_names or [])))
    problems: list[str] = []
    shards = {shard.name: shard for shard in run.shards}
    for name, group in groupby(rows, lambda row: row.shard):
        keys = {row.index: row.key for row in group}
        try:
            for sample in _read(run.tar(shards[name]), keys, names.dataset, run.config):
                samples[name, sample.index] = sample
        except (OSError, ShardError) as error:
            problems.append(f"{name}: shown without its images, which cannot be read ({error})")
    if run.run.class_names is None:
        agreement = measure_agreement(run.store, run.run, {shard.name for shard in run.shards})
        # The dataset's names are the model's only if its numbers are.
        names.model = names.dataset if agreement is not None and agreement.proven else {}
    return samples, names, problems


def _read(shard: Shard, keys: dict[int, str], names: dict[int, str], config: ExtractConfig) -> Iterable[Sample]:
    """Yield the samples with these indices and keys. Add the class names in their json members to `names`."""
    last = max(keys)
    for sample in read_samples(shard, config.labels, named=config.members):
        name = extra(sample).get("name")
        if sample.label is not None and isinstance(name, str):
            names[sample.label] = name
        if sample.index in keys:
            if sample.key != keys[sample.index]:
                raise ShardError(f"it has {sample.key!r} instead of the run's {keys[sample.index]!r}")
            yield sample
        if sample.index == last:
            return


def _card(row: Row, sample: Sample | None, names: _Names, measured: dict[str, float]) -> Card:
    values = {name: getattr(row, name) for name in _VALUES}
    facts = _facts(row, names)
    shown = pictures(row, sample, {"target": "", "label": "", "mask": "", "box": ""} | facts)
    view = View(shown, [*facts.items(), *numbered(measured)], _trouble(row, sample))
    return Card(row.key, row.shard, row.status, [view], values | measured)


def _wide_card(
    row: Row, sample: Sample | None, rows: dict[str, Row | None], names: _Names, measured: dict[str, float]
) -> Card:
    """Return the card of an image: the photograph, then each run's picture of it."""
    photo_YX3 = photograph(row, sample)
    facts = _facts(row, names)
    shown = []
    if photo_YX3 is not None:
        words = f"{row.key}, {facts.get('label', '')}"
        first = encode(photo_YX3, words, given_boxes(sample, row), "photograph")
        shown.append(first)
        height, width = photo_YX3.shape[:2]
        for caption, other in rows.items():
            drawn = None if other is None else overlay(other, first.layers[0], photo_YX3, caption)
            why = "not in this run" if other is None else other.error or other.status
            shown.append(drawn or Picture((), width, height, why, (), caption))
    some_facts = [(name, facts[name]) for name in ("label", "predicted", "target", "score", "size") if name in facts]
    values = {name: getattr(row, name) for name in _VALUES if name != "mask_area"}
    view = View(shown, [*some_facts, *numbered(measured)], _trouble(row, sample))
    return Card(row.key, row.shard, row.status, [view], values | measured)


def _facts(row: Row, names: _Names) -> dict[str, str]:
    def named(number: int | None, table: dict[int, str]) -> str:
        return "" if number is None else f"{number} {table.get(number, '')}".strip()

    facts = {
        "label": named(row.label, names.dataset or names.model),
        "predicted": named(row.predicted, names.model),
        "target": named(row.target, names.model),
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


def _same(row: Row, run: SaliencyRun) -> Row | None:
    """Return another run's row of the same sample, of the same target if possible."""
    rows = run.rows(row.key, row.shard) or run.rows(row.key)
    return next((other for other in rows if other.target == row.target), rows[0] if rows else None)


def _captions(runs: Sequence[SaliencyRun]) -> list[str]:
    """Return a unique caption for each run: its method, with layer, model, options or target if several share it."""
    tries = [
        [run.config.method for run in runs],
        [" ".join([run.config.method, *run.config.layer]) for run in runs],
        [" ".join([run.config.method, *run.config.layer, run.config.model]) for run in runs],
        [f"{run.config.method} {_options(run, _CAPTION)}" for run in runs],
        [f"{run.config.method} {run.config.target.text}" for run in runs],
        [f"{run.config.method} {run.path}" for run in runs],
    ]
    counts = [Counter(names) for names in tries]
    captions = []
    for number, run in enumerate(runs):
        unique = (names[number] for names, count in zip(tries, counts, strict=True) if count[names[number]] == 1)
        caption = next(unique, None)
        if caption is None:
            raise UserError(f"{run.path} is given twice")
        captions.append(caption)
    return captions


def _in_short(run: SaliencyRun) -> str:
    config = run.config
    facts = [run.path, config.model, *config.layer, f"target {config.target.text}", _options(run), run.run.fingerprint]
    return ", ".join(filter(None, facts))


def _options(run: SaliencyRun, length: int | None = None) -> str:
    """Return the method's options. Values longer than `length` are cut to their end, where files and digests differ."""
    shown = {name: str(value) for name, value in run.config.method_options.items()}
    if length is not None:
        shown = {name: text if len(text) <= length else f"...{text[-length:]}" for name, text in shown.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _provenance(run: SaliencyRun) -> list[tuple[str, str]]:
    """Return how the run was made, for the page's header."""
    config = run.config
    statuses: dict[str, int] = {}
    for receipt in run.receipts:
        for status, count in receipt.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    how = config.preprocess
    crop = "x".join(map(str, dict.fromkeys(how.shape)))
    shape = f"squashed to {crop}" if how.squash else f"shorter side {how.resize}, crop {crop}"
    facts = {
        "run": run.path,
        "model": f"{config.model} (weights {config.weights}, {config.weights_digest[:12]})",
        "method": f"{config.method} {_options(run)}",
        "layer": ", ".join(config.layer),
        "target": config.target.text,
        "preprocess": f"{shape}, {how.interpolation}, mean {_numbers(how.mean)}, std {_numbers(how.std)}",
        "masks": config.discretize.text,
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
