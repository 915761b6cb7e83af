"""Evaluate runs: each family of metrics is a job over a run's shards, in a folder of the run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.engine.derived import reading_results
from saltern.pipeline.metrics.census import Census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.faithfulness.further import further_classifiers
from saltern.pipeline.metrics.families import FAMILIES, choose_metrics
from saltern.pipeline.metrics.measure import measure, writing_to
from saltern.pipeline.metrics.summarise import summarise
from saltern.pipeline.metrics.wanted import left_out, same_samples, wanted_shards
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
    unread: dict[str, str]  # shards that count in no row of some table's column, with the reason
    notes: list[str]  # for the user, about skipped shards
    lost: frozenset[str] = frozenset()  # shards that no family measures, as a run lacks them
    estimates: dict[str, Estimate] = field(default_factory=dict)  # by metric
    censuses: dict[str, Census] = field(default_factory=dict)  # by family

    @property
    def shards(self) -> list[Shard]:
        """The shards to measure."""
        return [shard for shard in self.wanted if shard.name not in self.lost]

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

    def for_all(self, lost: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Return the shards that each run loses, with the reason, so that runs of the same samples stay comparable.

        Args:
            lost: by each run alone.
        """
        wanted = [judged.wanted for judged in self.runs]
        alike = all(same_samples(wanted[0], shards) for shards in wanted[1:])
        return left_out(wanted, lost) if alike else [dict(own) for own in lost]


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
    _skip_failed(evaluation)
    for name in chosen:
        _judge_family(evaluation, name, request, options)
    first = evaluation.runs[0]
    for judged in evaluation.runs:
        judged.notes += _notes(judged, evaluation)
        if not same_samples(judged.wanted, first.wanted):
            judged.notes.append(
                f"{judged.run.path} was judged on other samples than {first.run.path}: compare neither their numbers, "
                "nor its numbers with the controls, which are of the first run's samples"
            )
    return evaluation


def named(words: Sequence[str], shards: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the folders of runs among the words, and the shards with the other words."""
    tars = [word for word in words[1:] if word.endswith(ENDINGS) or Store(word).read("run.json") is None]
    return [word for word in words if word not in tars], [*shards, *tars]


def _opened(path: str, request: EvaluateRequest) -> Judged:
    run = open_run(path, request.shards)
    return Judged(run, *wanted_shards(run, request.shards, skip_failed=request.skip_failed))


def _skip_failed(evaluation: Evaluation) -> None:
    """Leave out the shards that a run lacks. Raise UserError if none is left."""
    failed = evaluation.for_all([judged.unread for judged in evaluation.runs])
    for judged, own in zip(evaluation.runs, failed, strict=True):
        judged.unread, judged.lost = own, frozenset(own)
        if judged.wanted and not judged.shards:
            name, why = next(iter(own.items()))
            raise UserError(
                f"{judged.run.path}: all shards failed, as {name}: {why}; repair them, and repeat the command"
            )


def _judge_family(evaluation: Evaluation, name: str, request: EvaluateRequest, options: RunOptions) -> None:
    """Measure the runs and the controls by one family, and write the summaries."""
    runs, family = evaluation.runs, FAMILIES[name]
    results, estimates = [], []
    for judged in runs:
        family.check(judged.run.path, judged.run.config)
        results.append(_measured(judged, name, request, options, controls=False))
        estimates.append(_sum_up(evaluation, judged, name, *results[-1]))
    store, done, unread = _measured(runs[0], name, request, options, controls=True)
    lost = [own for _, _, own in results]
    lost = evaluation.for_all([{**unread, **lost[0]}, *lost[1:]])
    for at, (judged, (own, whole, known)) in enumerate(zip(runs, results, strict=True)):
        if lost[at].keys() > known.keys():  # shards that it has, and another run has not
            estimates[at] = _sum_up(evaluation, judged, name, own, whole, lost[at])
    with reading_results(store.path):
        found = summarise(family, store, [shard for shard in done if shard.name not in lost[0]])
    for subject, values in found.items():
        evaluation.controls.setdefault(subject, {}).update(values)
    for judged, values in zip(runs, estimates, strict=True):
        picture = family.draw({FOUND: values, **found})
        if picture is not None:
            with writing_to(judged.run):
                judged.run.store.write(f"metrics/{name}.png", picture)


def _sum_up(
    evaluation: Evaluation, judged: Judged, name: str, store: Store, done: list[Shard], unread: dict[str, str]
) -> dict[str, Estimate]:
    """Write the summary of a run by one family. Returns all of its estimates.

    Args:
        evaluation: of all runs.
        judged: the run.
        name: of the family.
        store: of the results.
        done: shards with results.
        unread: shards that do not count, with the reason.
    """
    census = Census(sized="other_size" in evaluation_schema(name).names)
    with reading_results(store.path):
        counted = [shard for shard in done if shard.name not in unread]
        estimates = next(iter(summarise(FAMILIES[name], store, counted, census).values()), {})
    judged.unread = {**judged.unread, **unread}
    FAMILIES[name].check_census(judged.run.path, census, judged.unread)
    # Those of one classifier are named METRIC@MODEL.
    metrics = evaluation.chosen[name]
    judged.estimates |= {name: own for name, own in estimates.items() if name.partition("@")[0] in metrics}
    judged.censuses[name] = census
    lost = {shard: why for shard, why in judged.unread.items() if shard in judged.lost or shard in unread}
    summary = {**describe(judged.run), **census.summary(), "unread_shards": lost, "metrics": to_json(estimates)}
    with writing_to(judged.run):
        judged.run.store.write(f"metrics/{name}.json", json.dumps(summary, indent=1).encode())
    return estimates


def _measured(
    judged: Judged, name: str, request: EvaluateRequest, options: RunOptions, *, controls: bool
) -> tuple[Store, list[Shard], dict[str, str]]:
    """Measure a run, or the controls over its shards, by one family. Returns as `measure`."""
    run, family = judged.run, FAMILIES[name]
    further = further_classifiers(request.classifiers, run.config) if family.takes_classifiers else ()
    pixels = family.multiplies and request.multiply == Multiply.pixels
    more = {"classifiers": further, "pixels": pixels}
    return measure(run, family, judged.shards, request, options, controls=controls, **more)


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
