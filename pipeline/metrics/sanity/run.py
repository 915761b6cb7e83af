"""Judge the sanity of a run's method by images of its shards, and keep the results in RUN/metrics."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from saltern.pipeline.engine.conduct import RunOptions
from saltern.pipeline.engine.derived import Derived, DoneRun, reading_results
from saltern.pipeline.metrics.measure import measure, writing_to
from saltern.pipeline.metrics.sanity.adversarial import Adversarial
from saltern.pipeline.metrics.sanity.attacked import AttackRun, judge_attacks
from saltern.pipeline.metrics.sanity.family import MAPPED, SanityFamily
from saltern.pipeline.metrics.sanity.plot import plot
from saltern.pipeline.metrics.sanity.verdict import COLUMNS, Curves, lines
from saltern.pipeline.metrics.subjects import read_subjects
from saltern.pipeline.runs.datafile import reading_data
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.schemas.config import ATTACK
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.evaluation import SANITY
from saltern.schemas.run import Shard
from saltern.schemas.saliency import OK

SUMMARY, PICTURE = f"metrics/{SANITY}.json", f"metrics/{SANITY}.png"


@dataclass(frozen=True)
class SanityRequest:
    """Options of `sanity`. None = the existing results' value, or the default."""

    run: str  # folder or URL
    images: int  # the first of the run that have a map
    stages: int | None = None  # in which the layers become random, in equal groups; 1: all at once; None: one a layer
    shards: Sequence[str] = ()  # where tars of the run are now, if they were moved; others are not used
    batch_size: int | None = None
    torch_threads: int | None = None
    deterministic: bool | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class Sanity:
    """The results, as JSON and as lines of text."""

    summary: dict[str, Any]
    lines: list[str]
    unread: dict[str, str] = field(default_factory=dict)  # shard -> reason


def sanity(request: SanityRequest, options: RunOptions) -> Sanity:
    """Judge the method of an extraction by cascading randomisation, that of an attack by the pixels that it changes.

    A resumable job of the engine. Writes RUN/metrics/sanity.json, and a row for each image (schemas.evaluation): for an
    extraction in RUN/metrics/sanity/, with the plot RUN/metrics/sanity.png, for an attack in RUN/metrics/adversarial/.
    A stage has one pass of the method over each image; all are in float32. Shards that cannot be read are skipped and
    listed.

    Args:
        request: the run, the images and the stages.
        options: of the execution; `out` is not used.

    Raises:
        UserError: no run, no image with a map, or a method that runs another network.
        StoppedError: the engine stopped before the end; finished shards are kept.
    """
    path = request.run
    store, run = load_run_folder(path)
    config = run.config.to_dict()
    head = {name: config[name] for name in ("model", "method", "layer", "options")}
    head = {"run": path, "fingerprint": run.fingerprint, **head}
    if run.config.job == ATTACK:
        attacked, unread = _attacks(AttackRun(path, store, run), request, options)
        summary = {**head, "unread_shards": unread, "adversarial": attacked.summary()}
        found = Sanity(summary, attacked.lines(), unread)
    else:
        opened = open_run(path, request.shards)
        curves, unread = _cascades(opened, request, options)
        summary = {**head, "seed": config["seed"], "unread_shards": unread, **curves.summary()}
        found = Sanity(summary, list(lines(curves)), unread)
        with writing_to(opened):
            store.write(PICTURE, plot(curves, f"{config['method']} of {config['model']}"))
    store.write(SUMMARY, json.dumps(found.summary, indent=1).encode())
    return found


def _attacks(run: AttackRun, request: SanityRequest, options: RunOptions) -> tuple[Adversarial, dict[str, str]]:
    """Measure the first images of an attack. Returns their figures, and the shards that could not be read."""
    shards = _first(run, run.shards, request.images, (OK,))
    if not shards:
        raise UserError(f"{run.path} has no row that is ok; `saltern status {run.path}` says why")
    found, unread = judge_attacks(run, shards, request, options)
    if not found.images:
        name, why = next(iter(unread.items()), (run.path, "its shards have no row that is ok"))
        raise UserError(f"no image could be judged: {name}: {why}")
    return found, unread


def _cascades(run: SaliencyRun, request: SanityRequest, options: RunOptions) -> tuple[Curves, dict[str, str]]:
    """Measure the first images that have a map. Returns their sums, and the shards that could not be read."""
    there = [shard for shard in run.shards if not request.shards or shard.name in run.given]
    shards = _first(run, there, request.images, MAPPED)
    if not shards:
        raise UserError(f"{run.path} has no image with a map; `saltern status {run.path}` says why")
    results = measure(run, SanityFamily, shards, request, options, stages=request.stages or 0)
    with reading_results(results.store.path):
        curves = _read_curves(results)
    if not curves.images:
        name, why = next(iter(results.unread.items()), (run.path, "its shards have no image with a map"))
        raise UserError(f"no image could be judged: {name}: {why}")
    return curves, results.unread


def _first(run: DoneRun, shards: Sequence[Shard], images: int, statuses: Collection[str]) -> list[Shard]:
    """Return the shards that hold the first images with these statuses; of the last one, its first samples only."""
    receipts = {shard.name: receipt for shard, receipt in zip(run.shards, run.receipts, strict=True)}
    wanted: list[Shard] = []
    for shard in shards:
        receipt = receipts[shard.name]
        count = sum(receipt.statuses.get(status, 0) for status in statuses)  # rows
        if receipt.rows == receipt.samples and count < images:  # no need to know which samples they are of
            wanted += [shard] * (count > 0)
            images -= count
            continue
        try:
            index_N = np.arange(receipt.samples) if count == receipt.rows else _indices(run, shard, statuses)
        except ShardError:
            wanted.append(shard)  # the engine names it
            continue
        if len(index_N) >= images:
            return [*wanted, replace(shard, take=int(index_N[images - 1]) + 1)]
        if len(index_N):
            wanted.append(shard)
        images -= len(index_N)
    return wanted


def _indices(run: DoneRun, shard: Shard, statuses: Collection[str]) -> NDArray[np.int64]:
    """Return the indices of the samples whose first row has one of these statuses."""
    with reading_data(run.store, run.run, shard) as file:
        rows = file.read(["index", "status"], use_threads=False)
    index_N, first_N = np.unique(rows["index"].to_numpy(), return_index=True)
    found_N: NDArray[np.int64] = index_N[np.isin(np.asarray(rows["status"].to_pylist())[first_N], list(statuses))]
    return found_N


def _read_curves(results: Derived) -> Curves:
    """Sum up the rows of the images with a map, in the order of the shards."""
    curves = Curves()
    names = ["layers", "entropy_before", "constant", *COLUMNS]
    for _, _, every in read_subjects(results, names):
        rows = every.filter(pc.is_valid(every["layers"]))
        if not rows.num_rows:
            continue
        columns = {
            name: rows[name].flatten().to_numpy(zero_copy_only=False).reshape(rows.num_rows, -1).T
            for name in ("constant", *COLUMNS)
        }
        before_N = rows["entropy_before"].to_numpy(zero_copy_only=False)
        curves.add(rows["layers"][0].as_py(), {**columns, "before": before_N})
    return curves
