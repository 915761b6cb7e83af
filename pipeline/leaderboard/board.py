"""Make a leaderboard: extract what is missing, judge all runs by the same metrics, write the table and the page."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from saltern.pipeline.engine.conduct import RunOptions, conduct
from saltern.pipeline.engine.derived import StoppedError
from saltern.pipeline.extract.extraction import extraction
from saltern.pipeline.extract.request import ExtractRequest
from saltern.pipeline.extract.several import each_method
from saltern.pipeline.leaderboard.page import board_page
from saltern.pipeline.metrics.evaluate import EvaluateRequest, Evaluation, evaluate
from saltern.pipeline.metrics.table import as_json, as_markdown, remarks
from saltern.pipeline.metrics.wanted import same_samples
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import SaliencyRun
from saltern.pipeline.storage.store import Store
from saltern.schemas.config import EXTRACT
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Leaderboard:
    """The results of `make_leaderboard`."""

    evaluation: Evaluation
    rates: list[float | None]  # images a second of the device, of each run; None if unknown

    def markdown(self) -> str:
        """Return the table, with the rates."""
        return as_markdown(
            self.evaluation, {"images/s": ["-" if rate is None else f"{rate:,.1f}" for rate in self.rates]}
        )

    def json(self) -> str:
        """Return everything as JSON."""
        made: dict[str, Any] = json.loads(as_json(self.evaluation))
        for run, rate in zip(made["runs"], self.rates, strict=True):
            run["images_per_second"] = rate
        return json.dumps(made, indent=1)


def make_leaderboard(
    request: ExtractRequest, runs: Sequence[str], judging: EvaluateRequest, options: RunOptions, shown: int
) -> Leaderboard:
    """Make a leaderboard, or go on with one: finished shards of runs and metrics are kept.

    Writes OUT/METHOD/ (the runs of the request), OUT/leaderboard.json, .md and .html. A shard that fails in one of the
    runs, or cannot be judged, is left out of all rows, and is in `evaluation.unread`.

    Args:
        request: names the methods to extract, commas between them.
        runs: further runs over the same shards, as of `extract --method casm`.
        judging: its metrics and arithmetic; `runs` and `shards` are not used.
        options: of the execution; `out` is the folder.
        shown: images on the page.

    Raises:
        UserError: as extract and evaluate; or the runs are not of the same shards.
        StoppedError: interrupted, or the device is lost; finished shards are kept.
    """
    out = options.out.rstrip("/")
    paths = [*extract_runs(request, options, out), *runs]
    _check_same(paths)  # before hours of judging
    evaluation = evaluate(replace(judging, runs=paths, skip_failed=True), options)
    board = Leaderboard(evaluation, [rate_of(judged.run) for judged in evaluation.runs])
    files = {
        "leaderboard.json": board.json(),
        "leaderboard.md": "\n\n".join([board.markdown(), *remarks(evaluation)]) + "\n",
        "leaderboard.html": board_page(evaluation, board.rates, shown),
    }
    try:
        for name, text in files.items():
            Store(out).write(name, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from error
    return board


def extract_runs(request: ExtractRequest, options: RunOptions, out: str) -> list[str]:
    """Extract the methods' runs, and return their folders. The runs lack shards that failed.

    Raises:
        StoppedError: the engine stopped before the end; finished shards are kept.
    """
    names = list(each_method(request))
    alone = f"{out}/{names[0]}" if len(names) == 1 else out
    # Only the table goes to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        result = conduct(extraction(request), replace(options, out=alone))
    if result.code not in (0, 1) or result.done + len(result.failures) < result.shards:
        raise StoppedError(result)
    return [f"{out}/{name}" for name in names]


def _check_same(paths: Sequence[str]) -> None:
    """Raise UserError if the runs are not of the same samples, so that numbers cannot be compared, or one is twice."""
    folders = [path.rstrip("/") for path in paths]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice; leave out one --run")
    first, *others = ((path, load_run_folder(path, EXTRACT)[1]) for path in paths)
    for path, run in others:
        if not same_samples(run.shards, first[1].shards):
            raise UserError(f"{path} is not of the same shards as {first[0]}; a leaderboard compares equals")


def rate_of(run: SaliencyRun) -> float | None:
    """Return the images a second of one device, from the seconds that it computed; None if they are unknown."""
    seconds = sum(receipt.seconds.get("compute", 0.0) for receipt in run.receipts)
    return sum(receipt.samples for receipt in run.receipts) / seconds if seconds else None
