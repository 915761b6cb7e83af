"""saltern bench: rates, memory and sizes against their goals."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect
from saltern.schemas import choices

if TYPE_CHECKING:
    from saltern.pipeline.bench.report import Report

app = typer.Typer(help="Measure rates, memory and sizes against their goals.", no_args_is_help=True)
_COMMAND = [sys.executable, "-m", "saltern"]

Out = Annotated[Path, opt.output("Folder for the report, as JSON with every round and as Markdown.", metavar="DIR")]
Rounds = Annotated[int, opt.execution("Measurements of each side; figures are ratios of their medians.", min=1)]
Images = Annotated[int, opt.execution("Images of a batch.", "--batch-size", min=1)]


@app.command()
def extract(
    ctx: typer.Context,
    shards: Annotated[
        list[str] | None, opt.inputs("Shards to measure on, repeatable; default: some are made.", metavar="SHARDS")
    ] = None,
    model: opt.Model = "resnet50",
    weights: opt.Weights = "none",
    method: opt.Method = "grad-cam",
    precision: opt.Precision = choices.Precision.fp32,
    out: Out = Path("bench"),
    device: opt.Device = choices.Device.auto,
    batch_size: opt.BatchSize = None,
    rounds: Rounds = 5,
) -> None:
    """Measure the whole run, the engines, memory, resume and bytes. About fifteen minutes on two cores."""
    from saltern.pipeline.bench.extract import measure
    from saltern.pipeline.bench.figures import figures_table
    from saltern.pipeline.bench.workload import ExtractBench
    from saltern.pipeline.machine import pick_device

    bench = collect(ExtractBench, ctx, command=_COMMAND, shards=shards or [], device=pick_device(device))
    report = _report(out / "extract", bench, f"{method} of {model}")
    _print(report, report.follow("figures", measure(bench), figures_table))


@app.command()
def host(
    ctx: typer.Context,
    out: Out = Path("bench"),
    batch_size: Images = 128,
    rounds: Rounds = 5,
) -> None:
    """Measure reading and writing without decoding and method, and the time under Python's lock. About a minute."""
    from saltern.pipeline.bench.figures import figures_table
    from saltern.pipeline.bench.host import HostBench, measure

    bench = collect(HostBench, ctx)
    report = _report(out / "host", bench, f"batch {batch_size}")
    _print(report, report.follow("figures", measure(bench), figures_table))


@app.command()
def localization(
    ctx: typer.Context,
    out: Out = Path("bench"),
    samples: Annotated[int, opt.execution("Maps to measure.", min=1)] = 50_000,
) -> None:
    """Measure the localization metrics from maps of 7 x 7 against wsolevaluation's way. About five minutes."""
    from saltern.pipeline.bench.figures import figures_table
    from saltern.pipeline.bench.localization import LocalizationBench, measure

    bench = collect(LocalizationBench, ctx)
    report = _report(out / "localization", bench, f"{samples} maps of 7 x 7")
    _print(report, report.follow("figures", measure(bench), figures_table))


@app.command()
def methods(
    ctx: typer.Context,
    only: Annotated[list[str] | None, opt.model("Method to measure, repeatable; default: all.", metavar="NAME")] = None,
    model: opt.Model = "resnet50",
    out: Out = Path("bench"),
    device: opt.Device = choices.Device.auto,
    batch_size: Images = 16,
    rounds: Rounds = 5,
) -> None:
    """Compare every method to its passes and to other libraries, with random weights. About twenty minutes."""
    from saltern.pipeline.bench.methods import MethodsBench, as_table, measure
    from saltern.pipeline.machine import pick_device
    from saltern.pipeline.methods import find

    for name in only or ():
        find(name)
    bench = collect(MethodsBench, ctx, device=pick_device(device), only=only or ())
    report = _report(out / "methods", bench, f"{model}, batch {batch_size}, float32")
    _print(report, report.follow("cases", measure(bench, _say), as_table))


@app.command()
def casm(
    ctx: typer.Context,
    model: opt.Model = "resnet50",
    out: Out = Path("bench"),
    device: opt.Device = choices.Device.auto,
    batch_size: Images = 32,
    rounds: Rounds = 5,
    thinning: Annotated[
        list[choices.ThinningName] | None, opt.training("Thinning to measure, repeatable; default: F, L and L100.")
    ] = None,
    workers: Annotated[
        int, opt.execution("Workers of a training that is compared to one of 1 worker; 1 skips both.", min=1)
    ] = 2,
) -> None:
    """Compare CASM's step to its passes, a training to its steps, 2 workers to one; random weights. Half an hour."""
    from saltern.pipeline.bench import feed
    from saltern.pipeline.bench.casm import CasmBench, as_table, measure
    from saltern.pipeline.machine import pick_device

    names = {"thinnings": [str(name) for name in thinning]} if thinning else {}
    bench = collect(CasmBench, ctx, device=pick_device(device), **names)
    report = _report(out / "casm", bench, f"{model}, batch {batch_size}")
    report.parts["scaling"] = None
    table = report.follow("steps", measure(bench, _say), as_table)
    _say("from shards")
    report.parts["feed"] = feed.measure(bench, _say)
    table += feed.as_line(report.parts["feed"]) + "\n\n"
    if workers > 1:
        from saltern.pipeline.bench.commands import TrainingBench, training_gain, training_line

        _say(f"1 and {workers} workers")
        training = TrainingBench(_COMMAND, workers, model, bench.device, batch_size)
        report.parts["scaling"] = training_gain(training)
        table += training_line(report.parts["scaling"], training) + "\n"
    _print(report, table)


def _report(path: Path, bench: Any, title: str) -> "Report":
    from dataclasses import asdict

    from saltern.pipeline.bench.report import Report

    return Report(path, asdict(bench), title)


def _print(report: "Report", table: str) -> None:
    typer.echo(report.write(table))
    _say(f"wrote {report.path}.json and {report.path}.md")


def _say(line: str) -> None:
    typer.echo(line, err=True)
