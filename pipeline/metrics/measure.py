"""Measure shards of a run by one family of metrics, in a resumable job of the engine."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

from saltern.pipeline.engine.conduct import Job, RunOptions
from saltern.pipeline.engine.derived import Derived, DoneRun, Source, derive, fields_of_model, writing
from saltern.pipeline.extract.request import Pinned, pin
from saltern.pipeline.metrics.family import Family
from saltern.pipeline.metrics.processor import MetricProcessor
from saltern.pipeline.runs.begin import new_run
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.schemas.config import EvaluateConfig
from saltern.schemas.evaluation import evaluation_schema
from saltern.schemas.run import Run, Shard


class Measuring(Pinned, Protocol):
    """A request's settings of the arithmetic."""

    @property
    def precision(self) -> str: ...


def measure(
    run: SaliencyRun,
    family: type[Family],
    shards: Sequence[Shard],
    request: Measuring,
    options: RunOptions,
    *,
    controls: bool = False,
    **more: Any,
) -> Derived:
    """Measure shards of a run by a family. Writes RUN/metrics/FAMILY/, or RUN/metrics/FAMILY-controls/.

    Args:
        run: that is judged.
        family: of metrics.
        shards: of the run.
        request: precision and the pinned settings.
        options: of the execution; `out` is not used.
        controls: judge the controls instead of the run's maps.
        more: further fields of the evaluation's config, as `classifiers`.

    Raises:
        UserError, StoppedError: as `engine.derived.derive`.
    """
    root = f"{run.path.rstrip('/')}/metrics/{family.name}{'-controls' * controls}"
    plan = partial(_plan, run, family, shards, request, {"controls": controls, **more})
    job = Job(plan, partial(MetricProcessor, source=Source.of(run), family=family))
    return derive(run, root, job, shards, options, fix_of(run))


def writing_to(run: DoneRun) -> AbstractContextManager[None]:
    """Raise UserError, with the fix, for an error of the run's folder."""
    return writing(run.path, fix_of(run))


def fix_of(run: DoneRun) -> str:
    """Return what to do if results cannot be written into a run's folder."""
    link = f"`cp -rs {os.path.abspath(run.path)} COPY` links its files in a folder of yours"
    return f"make room, or measure a copy: {link if run.store.local else 'of its folder, without the shards'}"


def _plan(
    run: SaliencyRun,
    family: type[Family],
    shards: Sequence[Shard],
    request: Measuring,
    more: dict[str, Any],
    existing: Run | None,
    device: str,
    workers: int,
) -> tuple[Run, list[str]]:
    """Return the evaluation as a run over the same shards, with the judged run's model."""
    made = EvaluateConfig(
        **fields_of_model(run.config),
        precision=request.precision if family.runs_network else "fp32",
        family=family.name,
        source=run.run.fingerprint,
        columns=tuple(evaluation_schema(family.name).names),
        **more,
        **pin(request, existing, device, workers),
    )
    return new_run(made, list(shards), run.run.class_names), []
