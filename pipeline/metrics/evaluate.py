"""Evaluate a run: compare its rows with the boxes in its shards, one shard in memory at a time."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.metrics.judge import AS_IS, NO_MAPS, SCALED, SCHEMA, SUBJECTS, Judged
from saltern.pipeline.metrics.wanted import wanted_shards
from saltern.pipeline.runs.agreement import measure_agreement
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import with_metadata

METRICS = {"le": ["le"], "om": ["om"], "f1": ["f1", "f1_mask"]}  # metric -> columns
UNIT_MAPS = ("casm",)  # methods whose map is already a mask in [0, 1]
LISTED = 100  # number of samples that the summary names; the Parquet files hold all
_Z = 1.96  # standard deviations that hold 95 % of a normal distribution


@dataclass
class Mean:
    """A mean, computed from sums without keeping the values."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float | None) -> None:
        """Add a value; None is ignored."""
        if value is not None:
            self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    @property
    def value(self) -> float:
        """The mean; NaN without values."""
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """The mean squared deviation from the mean; NaN without values."""
        return max(self.squares / self.count - self.value * self.value, 0.0) if self.count else math.nan

    def percent(self) -> dict[str, float] | None:
        """Return the mean and half its 95 % interval (normal approximation), percent; None without values."""
        if not self.count:
            return None
        return {"value": 100 * self.value, "plus_minus": 100 * _Z * math.sqrt(self.variance / self.count)}


@dataclass
class Evaluation:
    """The results of `evaluate`."""

    run: SaliencyRun
    columns: list[str]
    notes: list[str]  # for the user, about skipped shards
    samples: int = 0  # samples with boxes, which the means are over
    without_boxes: int = 0
    bad_annotations: int = 0
    other_size: int = 0
    several: bool = False
    statuses: Counter[str] = field(default_factory=Counter)  # of the judged rows
    first_bad: dict[str, str] = field(default_factory=dict)  # shard and key -> reason; at most LISTED
    first_failed: dict[str, str] = field(default_factory=dict)  # shard and key -> reason; at most LISTED
    unread: dict[str, str] = field(default_factory=dict)  # shard -> reason
    means: dict[str, dict[str, Mean]] = field(init=False)  # subject -> column -> mean

    def __post_init__(self) -> None:
        self.means = {subject: {column: Mean() for column in self.columns} for subject in SUBJECTS}

    @property
    def maps(self) -> str:
        """How F1 treats the maps: one of judge.MAPS."""
        config = self.run.config
        return NO_MAPS if not config.save_map else AS_IS if config.method in UNIT_MAPS else SCALED

    def add(self, part: Judged) -> None:
        """Add the samples of a shard."""
        self.samples += len(part.rows)
        self.without_boxes += part.without_boxes
        self.bad_annotations += len(part.bad)
        self.other_size += part.other_size
        self.several = self.several or part.several
        self.statuses.update(row["status"] for row in part.rows)
        for first, more in ((self.first_bad, part.bad), (self.first_failed, part.failed)):
            first.update(list(more.items())[: LISTED - len(first)])
        for subject, means in self.means.items():
            for column, mean in means.items():
                for row in part.rows:
                    mean.add(row[f"{subject}_{column}"])

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON, the means in percent."""
        config = self.run.config.to_dict()
        return {
            "run": self.run.path,
            "fingerprint": self.run.run.fingerprint,
            **{name: config[name] for name in ("model", "method", "target", "discretize")},
            "samples": self.samples,
            "without_boxes": self.without_boxes,
            "bad_annotations": self.bad_annotations,
            "annotated_at_another_size": self.other_size,
            "statuses": dict(self.statuses),
            "first_failed": self.first_failed,
            "first_bad_annotations": self.first_bad,
            "unread_shards": self.unread,
            "notes": self.notes,
            "f1_map": self.maps,
            "percent": {
                subject: {column: mean.percent() for column, mean in means.items()}
                for subject, means in self.means.items()
            },
        }


def evaluate(path: str, patterns: Sequence[str] = (), metrics: Sequence[str] = ()) -> Evaluation:
    """Judge a run by the boxes in its shards' json members, in pixels of the original images.

    - LE: no box of the row has an IoU of more than 0.5 with a true one. OM: the same, or the top-1 is wrong.
    - F1 (continuous) of the map m in [0, 1], the best over the true boxes. A real-valued map is scaled from its
      smallest stored value to its largest, then laid over the original (bilinear, 0 outside of the crop). Maps of
      UNIT_MAPS are not scaled. F1 of the mask is the same with m = mask.
    - Baselines: the centre box of half the image's area (see centre_box), and the whole image.

    A failed row counts as a miss and is listed. If a sample has several targets, its first row counts. Samples without
    boxes are skipped and counted. Shards that cannot be read are skipped and listed.

    On the first 2,000 validation images of Tiny ImageNet, 160 pixels, EfficientNet-Lite0, CAM of the top-1, mean:1: LE
    39.0, F1 51.6; of the label, LE 38.5, F1 51.6. (Boxes read as half-open would give LE 40.2 and F1 51.1.)

    Writes RUN/metrics/localization.json, and for each shard RUN/metrics/localization/<shard>.parquet (judge.SCHEMA).

    Args:
        path: the run's folder or URL.
        patterns: some or all of its shards at their present paths; none = all, where the run read them.
        metrics: names in METRICS, commas allowed; none = all.

    Raises:
        UserError: no run, an incomplete run, shards of another run, an unknown metric, no boxes, a read-only RUN.
    """
    columns = _columns(metrics)
    run = open_run(path, patterns)
    shards, notes = wanted_shards(run, patterns)
    if "om" in columns and run.config.labels is None:
        agreement = measure_agreement(run.store, run.run, {shard.name for shard in run.shards})
        notes += [f"OM tells nothing here: {agreement.text}"] if agreement is not None and agreement.doubtful else []
    evaluation = Evaluation(run, columns, notes)
    try:
        names = {"metrics/localization.json", *(_rows_name(shard) for shard in run.run.shards)}
        there = (f"metrics/{name}" for name in run.store.listing("metrics", ""))
        run.store.remove(name for name in there if name in names)
        run.store.prune("metrics")
        for shard in shards:
            _take(evaluation, shard)
        _check(evaluation)
        run.store.write("metrics/localization.json", json.dumps(evaluation.summary(), indent=1).encode())
    except OSError as error:
        raise UserError(f"{path}: the results cannot be written there: {error}") from error
    return evaluation


def _columns(metrics: Sequence[str]) -> list[str]:
    words = [word.strip().lower() for text in metrics for word in text.split(",") if word.strip()]
    for word in words:
        if word not in METRICS:
            raise UserError(f"--metric {word!r} is not one of {', '.join(METRICS)}")
    return [column for metric, columns in METRICS.items() if metric in words or not words for column in columns]


def _take(evaluation: Evaluation, shard: Shard) -> None:
    """Judge a shard. If it cannot be read to its end, none of its samples counts, and it is listed as unread."""
    part = Judged(evaluation.maps)
    try:
        for sample, rows in evaluation.run.joined(shard):
            part.add(sample, rows)
    except (ShardError, OSError, pa.ArrowInvalid) as error:
        evaluation.unread[shard.name] = " ".join(str(error).split())
        return
    evaluation.add(part)
    schema = with_metadata(SCHEMA, {"fingerprint": evaluation.run.run.fingerprint})
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(part.rows, schema), stream, compression="zstd")
    evaluation.run.store.write(_rows_name(shard), stream.getvalue().to_pybytes())


def _rows_name(shard: Shard) -> str:
    return f"metrics/localization/{shard.name}.parquet"


def _check(evaluation: Evaluation) -> None:
    """Raise UserError if all shards were read and no sample could be judged."""
    if evaluation.samples or evaluation.unread:
        return
    why = "; ".join(f"{place}: {reason}" for place, reason in list(evaluation.first_bad.items())[:1])
    fix = "`saltern pack --boxes` packs ILSVRC annotations as `boxes` of the json member"
    skipped = evaluation.without_boxes + evaluation.bad_annotations
    raise UserError(f"none of the {skipped:,} samples has boxes to judge by ({why or fix})")
