"""Localization numbers of a run: its rows beside the boxes in its shards, one shard in memory at a time."""

import json
import math
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saltern.pipeline.metrics.judge import AS_IS, NO_MAPS, SCALED, SCHEMA, SUBJECTS, Judged
from saltern.pipeline.metrics.wanted import wanted_shards
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.pipeline.storage.store import session
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.run import Shard
from saltern.schemas.saliency import with_metadata

METRICS = {"le": ["le"], "om": ["om"], "f1": ["f1", "f1_mask"]}  # what is asked for -> columns
UNIT_MAPS = ("casm",)  # methods whose map is a mask in [0, 1] already
LISTED = 100  # samples that the summary names; the Parquet files hold all
_Z = 1.96  # 95 % of a normal distribution


@dataclass
class Mean:
    """A mean, from sums, so that no sample is kept."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    def percent(self) -> dict[str, float] | None:
        """The mean and half its 95 % interval (normal approximation), percent; None where nothing was added."""
        if not self.count:
            return None
        mean = self.total / self.count
        spread = max(self.squares / self.count - mean * mean, 0.0)
        return {"value": 100 * mean, "plus_minus": 100 * _Z * math.sqrt(spread / self.count)}


@dataclass
class Evaluation:
    """What `evaluate` found."""

    run: SaliencyRun
    columns: list[str]
    notes: list[str]  # for people, on what was left out
    samples: int = 0  # with boxes: what the means are over
    without_boxes: int = 0
    bad_annotations: int = 0
    other_size: int = 0
    several: bool = False
    statuses: Counter[str] = field(default_factory=Counter)  # of the run's rows that were judged
    first_bad: dict[str, str] = field(default_factory=dict)  # shard and key -> reason; LISTED at most
    first_failed: dict[str, str] = field(default_factory=dict)  # likewise
    unread: dict[str, str] = field(default_factory=dict)  # shard -> reason
    means: dict[str, dict[str, Mean]] = field(init=False)  # subject -> column -> mean

    def __post_init__(self) -> None:
        self.means = {subject: {column: Mean() for column in self.columns} for subject in SUBJECTS}

    @property
    def maps(self) -> str:
        """What F1 is of: one of judge.MAPS."""
        config = self.run.run.config
        return NO_MAPS if not config.save_map else AS_IS if config.method in UNIT_MAPS else SCALED

    def add(self, part: Judged) -> None:
        """Take in a shard."""
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
        """All of it as JSON; the means in percent."""
        config = self.run.run.config
        return {
            "run": self.run.path,
            "fingerprint": self.run.run.fingerprint,
            **{name: getattr(config, name) for name in ("model", "method", "target", "discretize")},
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
    """Judge a run by the boxes in its shards' json members; every number is in the original's frame.

    - LE: no IoU of more than 0.5 between the row's box and a true one (no mask, no hit). OM: no hit, or a wrong top-1.
    - F1 (continuous) of the map m in [0, 1], the best over the true boxes. A real-valued map is scaled from its least
      stored value to its largest, then laid over the original (bilinear, 0 outside of the crop); maps
      of UNIT_MAPS are taken as they are. F1 of the mask is the same with m = mask.
    - Baselines: the centre box of half the image's area (see centre_box), and the whole image.

    A failed row has neither box nor map: a miss, and listed. Of a sample with several targets the first row counts.
    Samples without boxes are left out and counted, and so are those of a shard that cannot be read.

    On the first 2,000 validation images of Tiny ImageNet, 160 pixels, EfficientNet-Lite0, CAM of the top-1, mean:1: LE
    39.0, F1 51.6; of the label, LE 38.5, F1 51.6. (Boxes left inclusive would give LE 40.2 and F1 51.1.)

    Leaves RUN/metrics/localization.json, and for each shard RUN/metrics/localization/<shard>.parquet (judge.SCHEMA).

    Args:
        path: of the run.
        patterns: its shards, where they lie now; none = where the run read them. Some of them are enough.
        metrics: of METRICS, commas allowed; none = all.

    Raises:
        UserError: no run there, one that is not whole, other shards, an unknown metric, no boxes, a RUN that takes no
            files.
    """
    columns = _columns(metrics)
    run = open_run(path)
    shards, notes = wanted_shards(run, patterns)
    found = Evaluation(run, columns, notes)
    try:
        for stale in ("localization", "localization.json"):
            run.store.remove(f"metrics/{stale}")
        with session(run.store) as scratch:
            for shard in shards:
                _take(found, shard, scratch)
            _check(found)
            _publish(found, "localization.json", json.dumps(found.summary(), indent=1).encode(), scratch)
    except OSError as error:
        raise UserError(f"{path}: the numbers cannot be written there: {error}") from error
    return found


def _columns(metrics: Sequence[str]) -> list[str]:
    words = [word.strip().lower() for text in metrics for word in text.split(",") if word.strip()]
    for word in words:
        if word not in METRICS:
            raise UserError(f"--metric {word!r} is none of {', '.join(METRICS)}")
    return [column for metric, columns in METRICS.items() if metric in words or not words for column in columns]


def _take(found: Evaluation, shard: Shard, scratch: Path) -> None:
    """Judge a shard. It counts as a whole, or is listed as unread."""
    part = Judged(found.maps)
    try:
        for sample, rows in found.run.joined(shard):
            part.add(sample, rows)
    except (ShardError, OSError, pa.ArrowInvalid) as error:
        found.unread[shard.name] = " ".join(str(error).split())
        return
    found.add(part)
    schema = with_metadata(SCHEMA, {"fingerprint": found.run.run.fingerprint})
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(part.rows, schema), stream, compression="zstd")
    _publish(found, f"localization/{shard.name}.parquet", stream.getvalue().to_pybytes(), scratch)


def _check(found: Evaluation) -> None:
    """Raises UserError where nothing could be judged though all was read."""
    if found.samples or found.unread:
        return
    why = "; ".join(f"{place}: {reason}" for place, reason in list(found.first_bad.items())[:1])
    fix = "`saltern pack --boxes` packs ILSVRC annotations as `boxes` of the json member"
    left_out = found.without_boxes + found.bad_annotations
    raise UserError(f"none of the {left_out:,} samples has boxes to judge by ({why or fix})")


def _publish(found: Evaluation, name: str, content: bytes, scratch: Path) -> None:
    made = scratch / uuid.uuid4().hex
    made.write_bytes(content)
    found.run.store.publish(made, f"metrics/{name}")
