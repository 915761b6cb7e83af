"""Evaluate runs: each family of metrics is a job over a run's shards, in a folder of the run."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from saltern.pipeline.engine.conduct import Job, RunOptions, RunResult, conduct
from saltern.pipeline.extract.request import new_run, pin
from saltern.pipeline.metrics.census import Census, take_census
from saltern.pipeline.metrics.estimate import Estimate
from saltern.pipeline.metrics.faithfulness.further import further_classifiers
from saltern.pipeline.metrics.families import FAMILIES, choose_metrics
from saltern.pipeline.metrics.processor import MetricProcessor, Source
from saltern.pipeline.metrics.wanted import same_samples, wanted_shards
from saltern.pipeline.runs.agreement import measure_agreement
from saltern.pipeline.runs.manifest import load_run, read_receipts, receipt_name
from saltern.pipeline.runs.measured import is_of
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.pipeline.shards.expand import ENDINGS
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import ClassifierConfig, EvaluateConfig
from saltern.schemas.errors import UserError
from saltern.schemas.evaluation import FOUND, evaluation_schema
from saltern.schemas.run import Run, Shard


@dataclass(frozen=True)
class EvaluateRequest:
    """Options of `evaluate`. None = the existing evaluation's value, or the default."""

    runs: Sequence[str]  # folders or URLs
    shards: Sequence[str] = ()  # where tars of the runs are now; none = all, where the runs read them
    metrics: Sequence[str] = ()  # names of metrics or families; none = families.DEFAULT
    classifiers: Sequence[str] = ()  # MODEL or MODEL=WEIGHTS, besides each run's own; of families that take them
    precision: str = "fp32"  # fp32 | tf32 | bf16 | fp16
    batch_size: int | None = None
    torch_threads: int | None = None
    deterministic: bool | None = None


class StoppedError(Exception):
    """The engine stopped before the end: interrupted, or without its device. The same command goes on."""

    def __init__(self, result: RunResult):
        super().__init__(result.path)
        self.result = result


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
    runs = [_opened(path, request.shards) for path in request.runs]
    evaluation = Evaluation(chosen, [Judged(run, notes) for run, _, notes in runs])
    if request.classifiers and not any(FAMILIES[name].takes_classifiers for name in chosen):
        raise UserError("--classifiers are for --metric masked, which is not among the chosen metrics")
    for name in chosen:
        own = []
        for judged, (run, shards, _) in zip(evaluation.runs, runs, strict=True):
            FAMILIES[name].check(run.path, run.config)
            own.append(_judge_run(judged, name, shards, request, options, chosen[name]))
        run, shards, _ = runs[0]
        _, found = _measure(run, name, shards, request, options, controls=True)
        for subject, estimates in found.items():
            evaluation.controls.setdefault(subject, {}).update(estimates)
        for (run, _, _), estimates in zip(runs, own, strict=True):
            picture = FAMILIES[name].draw({FOUND: estimates, **found})
            if picture is not None:
                with _writing(run.path):
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
    unread, found = _measure(judged.run, name, shards, request, options, controls=False)
    done = [shard for shard in shards if shard.name not in unread]
    store = Store(_folder(judged.run, name, controls=False))
    census = take_census(store, done, "other_size" in evaluation_schema(name).names)
    FAMILIES[name].check_census(judged.run.path, census, unread)
    estimates = next(iter(found.values()), {})
    judged.estimates |= {metric: estimates[metric] for metric in metrics if metric in estimates}
    judged.unread |= unread
    judged.census = judged.census if judged.census.statuses else census
    summary = {**describe(judged.run), **census.summary(), "unread_shards": unread, "metrics": to_json(estimates)}
    with _writing(judged.run.path):
        judged.run.store.write(f"metrics/{name}.json", json.dumps(summary, indent=1).encode())
    return estimates


def describe(run: SaliencyRun) -> dict[str, Any]:
    """Return what a summary says about its run."""
    config = run.config.to_dict()
    named = {name: config[name] for name in ("model", "method", "target", "discretize")}
    return {"run": run.path, "fingerprint": run.run.fingerprint, **named}


def to_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {metric: estimate.to_dict() for metric, estimate in estimates.items()}


def _measure(
    run: SaliencyRun, name: str, shards: list[Shard], request: EvaluateRequest, options: RunOptions, *, controls: bool
) -> tuple[dict[str, str], dict[str, dict[str, Estimate]]]:
    """Run the job of one family.

    Returns:
        Shards that could not be read, with the reason; the estimate of each metric by subject.
    """
    root = _folder(run, name, controls=controls)
    store = Store(root)
    digests = {shard.name: receipt.digest for shard, receipt in zip(run.shards, run.receipts, strict=True)}
    source = Source(run.path, replace(run.run, shards=[]), run.given)
    further = further_classifiers(request.classifiers, run.config) if FAMILIES[name].takes_classifiers else ()
    plan = partial(_plan, request, run, name, shards, controls, further)
    with _writing(run.path):
        overwrite = _prepare(store, partial(plan, _existing(store)), digests)
    # Only the table goes to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        job = Job(plan, partial(MetricProcessor, source=source, family=FAMILIES[name]))
        result = conduct(job, replace(options, out=root, overwrite=overwrite))
    if result.code not in (0, 1):
        raise StoppedError(result)
    receipts = read_receipts(store, plan(load_run(store), "cpu", 1)[0])
    done = [shard for shard in shards if shard.name in receipts]
    if len(done) + len(result.failures) < len(shards):
        raise UserError(f"{root}: the evaluation stopped before its end; repeat the command to go on")
    return result.failures, FAMILIES[name].summarise(store, done)


def _existing(store: Store) -> Run | None:
    """Return the evaluation in the folder. Raise UserError, with the fix, if it cannot be read."""
    try:
        return load_run(store)
    except UserError as error:
        raise UserError(f"{error}; remove {store.full('')} and repeat the command: it is measured again") from error


def _folder(run: SaliencyRun, name: str, *, controls: bool) -> str:
    return f"{run.path.rstrip('/')}/metrics/{name}{'-controls' * controls}"


def _plan(
    request: EvaluateRequest,
    run: SaliencyRun,
    name: str,
    shards: list[Shard],
    controls: bool,
    classifiers: tuple[ClassifierConfig, ...],
    existing: Run | None,
    device: str,
    workers: int,
) -> tuple[Run, list[str]]:
    """Return the evaluation as a run over the same shards, with the judged run's model."""
    config = run.config
    made = EvaluateConfig(
        model=config.model,
        weights=config.weights,
        weights_digest=config.weights_digest,
        classes=config.classes,
        prompts=config.prompts,
        preprocess=config.preprocess,
        precision=request.precision if FAMILIES[name].runs_network else "fp32",
        seed=config.seed,
        family=name,
        source=run.run.fingerprint,
        controls=controls,
        columns=tuple(evaluation_schema(name).names),
        classifiers=classifiers,
        **pin(request, existing, device, workers),
    )
    return new_run(made, shards, run.run.class_names), []


def _prepare(store: Store, plan: Callable[[str, int], tuple[Run, list[str]]], digests: Mapping[str, str]) -> bool:
    """Forget what does not hold any more in the folder of an evaluation: results are derived, and can be made again.

    Returns:
        Whether the evaluation that is there is another one, and is to be replaced.
    """
    existing = _existing(store)
    if existing is None:
        # Older versions wrote a file for each shard here.
        store.remove(name for name in store.listing("", ".parquet") if name.removesuffix(".parquet") in digests)
        return False
    run = plan("cpu", 1)[0]
    if existing.config.differences(run.config):
        return True
    if existing.shards != run.shards:  # others of the run's, or at other places
        store.write("run.json", run.to_json())
    receipts = read_receipts(store, run).items()
    store.remove(receipt_name(name) for name, receipt in receipts if not is_of(receipt, digests[name]))
    return False


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """Raise UserError for an error of the run's folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: the results cannot be written there: {error}") from error


def _notes(judged: Judged, evaluation: Evaluation) -> list[str]:
    run = judged.run
    if "om" not in evaluation.chosen.get("localization", ()) or run.config.labels is not None:
        return []
    agreement = measure_agreement(run.store, run.run, {shard.name for shard in run.shards})
    doubtful = agreement is not None and agreement.doubtful
    return [f"OM tells nothing here: {agreement.text}"] if agreement is not None and doubtful else []
