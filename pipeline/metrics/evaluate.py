"""Evaluate runs: each family of metrics is a job over a run's shards, in a folder of the run."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.engine.derived import Derived, reading_results
from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.faithfulness.further import further_classifiers
from saltern.pipeline.metrics.families import FAMILIES, choose_metrics
from saltern.pipeline.metrics.measure import measure, writing_to
from saltern.pipeline.metrics.summarise import summarise
from saltern.pipeline.metrics.wanted import damaged, left_out, same_samples, wanted_shards
from saltern.pipeline.runs.agreement import measure_agreement
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.pipeline.shards.expand import ENDINGS
from saltern.pipeline.storage.store import Store
from saltern.schemas.choices import Multiply, check_choice
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import FOUND, evaluation_schema
from saltern.schemas.run import Shard


@dataclass(frozen=True)
class EvaluateRequest:
    """Options of `evaluate`. None = the existing evaluation's value, or the default."""

    runs: Sequence[str]  # folders or URLs
    shards: Sequence[str] = ()  # where tars of the runs are now; none = all, where the runs read them
    metrics: Sequence[str] = ()  # names of metrics or families; none = families.DEFAULT
    classifiers: Sequence[str] = ()  # MODEL or MODEL=WEIGHTS, besides each run's own; of families that take them
    multiply: str = "normalised"  # normalised | pixels: what maps multiply, in families that do
    precision: str = "fp32"  # fp32 | tf32 | bf16 | fp16
    batch_size: int | None = None
    torch_threads: int | None = None
    deterministic: bool | None = None
    skip_failed: bool = False  # shards that failed in a run; they count for none of the runs


@dataclass
class Judged:
    """The results of one run."""

    run: SaliencyRun
    wanted: list[Shard]
    unread: dict[str, str]  # shards that count for nothing, with the reason
    notes: list[str]  # for the user, about skipped shards
    estimates: dict[str, Estimate] = field(default_factory=dict)  # by metric
    censuses: dict[str, Census] = field(default_factory=dict)  # by family

    @property
    def shards(self) -> list[Shard]:
        """The shards that count."""
        return [shard for shard in self.wanted if shard.name not in self.unread]

    @property
    def census(self) -> Census:
        """The samples of the first family that counted some."""
        return next((own for own in self.censuses.values() if own.statuses), Census())


@dataclass
class Evaluation:
    """The results of `evaluate`: of each run, and of the controls over the shards of the first."""

    chosen: dict[str, list[str]]  # metrics by family
    runs: list[Judged]
    controls: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # by subject and metric
    multiply: str | None = None  # what maps multiply; None if no family does

    @property
    def unread(self) -> dict[str, str]:
        """Shards that could not be judged, with the reason."""
        return {shard: why for judged in self.runs for shard, why in judged.unread.items()}

    def leave_out(self, lost: Sequence[Mapping[str, str]]) -> None:
        """Leave shards out of all runs, so that runs of the same samples stay comparable.

        Args:
            lost: the shards that each run has lost, with the reason.
        """
        wanted = [judged.wanted for judged in self.runs]
        alike = all(same_samples(wanted[0], shards) for shards in wanted[1:])
        for judged, own in zip(self.runs, left_out(wanted, lost) if alike else lost, strict=True):
            judged.unread = {**judged.unread, **own}


def evaluate(request: EvaluateRequest, options: RunOptions) -> Evaluation:
    """Measure runs by families of metrics (families.FAMILIES).

    Each family is a resumable job of the engine. It writes RUN/metrics/FAMILY/ (one row for each sample and subject,
    schemas.evaluation) and RUN/metrics/FAMILY.json. The controls are judged once, over the shards of the first run, in
    RUN/metrics/FAMILY-controls/. If a sample has several targets, its first row counts. Shards that cannot be read are
    skipped and listed.

    Args:
        request: which runs, shards and metrics.
        options: of the execution; `out` is not used.

    Raises:
        UserError: no run, an incomplete run, shards of another run, an unknown metric, nothing to judge by, a
            read-only RUN.
        StoppedError: interrupted, or the device is lost; finished shards are kept.
    """
    chosen = choose_metrics(request.metrics)
    check_choice("--multiply", request.multiply, Multiply)
    multiply = request.multiply if any(FAMILIES[name].multiplies for name in chosen) else None
    evaluation = Evaluation(chosen, [_opened(path, request) for path in request.runs], multiply=multiply)
    if request.classifiers and not any(FAMILIES[name].takes_classifiers for name in chosen):
        raise UserError("--classifiers are for --metric masked, which is not among the chosen metrics")
    _check(evaluation)
    results = {name: _measure(evaluation, name, request, options) for name in chosen}
    first, *others = map(_unread, zip(*(runs for runs, _ in results.values()), strict=True))
    evaluation.leave_out([_unread(controls for _, controls in results.values()) | first, *others])
    # No file is changed before all metrics are known.
    written = [file for name in chosen for file in _sum_up(evaluation, name, *results[name])]
    for run, name, content in written:
        with writing_to(run):
            run.store.write(name, content)
    _compare(evaluation)
    return evaluation


def _compare(evaluation: Evaluation) -> None:
    """Note what the reader of the table must know to compare its rows."""
    first = evaluation.runs[0]
    for judged in evaluation.runs:
        judged.notes += _notes(judged, evaluation)
        if not same_samples(judged.wanted, first.wanted):
            judged.notes.append(
                f"{judged.run.path} was judged on other samples than {first.run.path}: compare neither their numbers, "
                "nor its numbers with the controls, which are of the first run's samples"
            )


def named(words: Sequence[str], shards: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the folders of runs among the words, and the shards with the other words."""
    tars = [word for word in words[1:] if word.endswith(ENDINGS) or Store(word).read("run.json") is None]
    return [word for word in words if word not in tars], [*shards, *tars]


def _opened(path: str, request: EvaluateRequest) -> Judged:
    run = open_run(path, request.shards)
    wanted, failed, notes = wanted_shards(run, request.shards, skip_failed=request.skip_failed)
    return Judged(run, wanted, failed | damaged(run, wanted), notes)


def _check(evaluation: Evaluation) -> None:
    """Leave out the shards that a run lacks. Raise UserError if none is left, or a family cannot judge a run."""
    evaluation.leave_out([judged.unread for judged in evaluation.runs])
    for judged in evaluation.runs:
        for name in evaluation.chosen:
            FAMILIES[name].check(judged.run.path, judged.run.config)
        if judged.wanted and not judged.shards:
            name, why = next(iter(judged.unread.items()))
            raise UserError(
                f"{judged.run.path}: all shards failed, as {name}: {why}; repair them, and repeat the command"
            )


def _measure(
    evaluation: Evaluation, name: str, request: EvaluateRequest, options: RunOptions
) -> tuple[list[Derived], Derived]:
    """Measure the runs, and the controls over the shards of the first, by one family."""
    family = FAMILIES[name]
    pixels = family.multiplies and request.multiply == Multiply.pixels

    def one(judged: Judged, controls: bool) -> Derived:
        further = further_classifiers(request.classifiers, judged.run.config) if family.takes_classifiers else ()
        more: dict[str, Any] = {"classifiers": further, "pixels": pixels}
        return measure(judged.run, family, judged.shards, request, options, controls=controls, **more)

    return [one(judged, False) for judged in evaluation.runs], one(evaluation.runs[0], True)


def _unread(results: Iterable[Derived]) -> dict[str, str]:
    """Return the shards that could not be read, with the reason, of the results of all families."""
    return {shard: why for own in results for shard, why in own.unread.items()}


def _sum_up(
    evaluation: Evaluation, name: str, results: list[Derived], of_controls: Derived
) -> Iterator[tuple[SaliencyRun, str, bytes]]:
    """Add the estimates of one family. Yields the files of each run, by name."""
    first, family = evaluation.runs[0], FAMILIES[name]
    controls = _sums(first, name, of_controls)
    for subject, values in controls.items():
        evaluation.controls.setdefault(subject, {}).update(values)
    for judged, own in zip(evaluation.runs, results, strict=True):
        census = judged.censuses[name] = Census(sized="other_size" in evaluation_schema(name).names)
        estimates = next(iter(_sums(judged, name, own, census).values()), {})
        family.check_census(judged.run.path, census, judged.unread)
        # Those of one classifier are named METRIC@MODEL.
        chosen = evaluation.chosen[name]
        judged.estimates |= {metric: value for metric, value in estimates.items() if metric.partition("@")[0] in chosen}
        summary = {**describe(judged.run), **census.summary(), "unread_shards": judged.unread}
        summary["metrics"] = to_json(estimates)
        yield judged.run, f"metrics/{name}.json", json.dumps(summary, indent=1).encode()
        picture = family.draw({FOUND: estimates, **controls})
        if picture is not None:
            yield judged.run, f"metrics/{name}.png", picture


def _sums(judged: Judged, name: str, results: Derived, census: Census | None = None) -> dict[str, dict[str, Estimate]]:
    """Return the estimates by subject, over the shards of a run that count."""
    counted = [shard for shard in results.shards if shard.name not in judged.unread]
    with reading_results(results.store.path):
        return summarise(FAMILIES[name], replace(results, shards=counted), census)


def describe(run: SaliencyRun) -> dict[str, Any]:
    """Return what a summary says about its run."""
    config = run.config.to_dict()
    named = {name: config[name] for name in ("model", "method", "target", "discretize")}
    return {"run": run.path, "fingerprint": run.run.fingerprint, **named}


def to_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {metric: estimate.to_dict() for metric, estimate in estimates.items()}


def _notes(judged: Judged, evaluation: Evaluation) -> list[str]:
    run = judged.run
    if "om" not in evaluation.chosen.get("localization", ()) or run.config.labels is not None:
        return []
    agreement = measure_agreement(run.store, run.run, {shard.name for shard in run.shards})
    doubtful = agreement is not None and agreement.doubtful
    return [f"OM tells nothing here: {agreement.text}"] if agreement is not None and doubtful else []
