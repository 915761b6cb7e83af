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
from saltern.pipeline.metrics.wanted import same_samples, wanted_shards
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


@dataclass
class Judged:
    """The results of one run."""

    run: SaliencyRun
    notes: list[str]  # for the user, about skipped shards
    estimates: dict[str, Estimate] = field(default_factory=dict)  # by metric
    census: Census = field(default_factory=Census)  # of the first family
    unread: dict[str, str] = field(default_factory=dict)  # shard -> reason


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
    runs = [_opened(path, request.shards) for path in request.runs]
    evaluation = Evaluation(chosen, [Judged(run, notes) for run, _, notes in runs], multiply=multiply)
    if request.classifiers and not any(FAMILIES[name].takes_classifiers for name in chosen):
        raise UserError("--classifiers are for --metric masked, which is not among the chosen metrics")
    for name in chosen:
        own = []
        for judged, (run, shards, _) in zip(evaluation.runs, runs, strict=True):
            FAMILIES[name].check(run.path, run.config)
            own.append(_judge_run(judged, name, shards, request, options, chosen[name]))
        run, shards, _ = runs[0]
        store, done, _ = _measured(run, name, shards, request, options, controls=True)
        with reading_results(store.path):
            found = summarise(FAMILIES[name], store, done)
        for subject, estimates in found.items():
            evaluation.controls.setdefault(subject, {}).update(estimates)
        for (run, _, _), estimates in zip(runs, own, strict=True):
            picture = FAMILIES[name].draw({FOUND: estimates, **found})
            if picture is not None:
                with writing_to(run):
                    run.store.write(f"metrics/{name}.png", picture)
    for judged, (_, shards, _) in zip(evaluation.runs, runs, strict=True):
        judged.notes += _notes(judged, evaluation)
        if not same_samples(shards, runs[0][1]):
            judged.notes.append(
                f"{judged.run.path} was judged on other samples than {runs[0][0].path}: compare neither their numbers, "
                "nor its numbers with the controls, which are of the first run's samples"
            )
    return evaluation


def named(words: Sequence[str], shards: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the folders of runs among the words, and the shards with the other words."""
    tars = [word for word in words[1:] if word.endswith(ENDINGS) or Store(word).read("run.json") is None]
    return [word for word in words if word not in tars], [*shards, *tars]


def _opened(path: str, patterns: Sequence[str]) -> tuple[SaliencyRun, list[Shard], list[str]]:
    run = open_run(path, patterns)
    return run, *wanted_shards(run, patterns)


def _judge_run(
    judged: Judged, name: str, shards: list[Shard], request: EvaluateRequest, options: RunOptions, metrics: list[str]
) -> dict[str, Estimate]:
    """Measure a run by one family, and write the summary. Returns all of its estimates."""
    store, done, unread = _measured(judged.run, name, shards, request, options, controls=False)
    with reading_results(store.path):
        census = Census(sized="other_size" in evaluation_schema(name).names)
        estimates = next(iter(summarise(FAMILIES[name], store, done, census).values()), {})
    FAMILIES[name].check_census(judged.run.path, census, unread)
    # Those of one classifier are named METRIC@MODEL.
    judged.estimates |= {name: own for name, own in estimates.items() if name.partition("@")[0] in metrics}
    judged.unread |= unread
    judged.census = judged.census if judged.census.statuses else census
    summary = {**describe(judged.run), **census.summary(), "unread_shards": unread, "metrics": to_json(estimates)}
    with writing_to(judged.run):
        judged.run.store.write(f"metrics/{name}.json", json.dumps(summary, indent=1).encode())
    return estimates


def _measured(
    run: SaliencyRun, name: str, shards: list[Shard], request: EvaluateRequest, options: RunOptions, *, controls: bool
) -> tuple[Store, list[Shard], dict[str, str]]:
    """Measure a run, or the controls over its shards, by one family. Returns as `measure`."""
    family = FAMILIES[name]
    further = further_classifiers(request.classifiers, run.config) if family.takes_classifiers else ()
    pixels = family.multiplies and request.multiply == Multiply.pixels
    return measure(run, family, shards, request, options, controls=controls, classifiers=further, pixels=pixels)


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
