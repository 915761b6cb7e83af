"""saltern bench: rates, memory and sizes against their goals."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saltern.jobs import options as opt
from saltern.jobs.config import collect
from saltern.schemas import choices

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
    """Measure the whole run, the engines, memory, resume and bytes. About ten minutes on two cores."""
    from dataclasses import asdict

    from saltern.pipeline.bench.extract import measure
    from saltern.pipeline.bench.figures import as_json, as_markdown, describe_machine
    from saltern.pipeline.bench.workload import ExtractBench
    from saltern.pipeline.engine.selection import select_engine
    from saltern.pipeline.machine import pick_device

    bench = collect(ExtractBench, ctx, command=_COMMAND, shards=shards or [], device=pick_device(device))
    machine = describe_machine()
    figures = measure(bench, lambda: select_engine("ray", "cpu", None, 2, 0.0))
    table = as_markdown(figures, machine)
    _write(out / "extract", as_json(figures, asdict(bench), machine), table)
    _report(out / "extract", table)


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
    from saltern.pipeline.bench.figures import describe_machine, machine_line
    from saltern.pipeline.bench.methods import MethodsBench, as_table, measure
    from saltern.pipeline.machine import pick_device
    from saltern.pipeline.methods import find

    for name in only or ():
        find(name)
    machine = describe_machine()
    bench = collect(MethodsBench, ctx, device=pick_device(device), only=only or ())
    entries, table = [], ""
    for entry in measure(bench, lambda line: typer.echo(line, err=True)):
        entries.append(entry)
        table = f"{machine_line(machine)}; {model}, batch {batch_size}, float32, 224 x 224\n\n{as_table(entries)}"
        _write(out / "methods", json.dumps({"machine": machine, "cases": entries}, indent=1), table)
    _report(out / "methods", table)


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
    """Compare CASM's training step to its passes, with random weights, and two workers to one. Half an hour."""
    from saltern.pipeline.bench.casm import CasmBench, as_table, measure
    from saltern.pipeline.bench.figures import describe_machine, machine_line
    from saltern.pipeline.machine import pick_device, see_own_modules

    see_own_modules()
    machine = describe_machine()
    names = {"thinnings": [str(name) for name in thinning]} if thinning else {}
    bench = collect(CasmBench, ctx, device=pick_device(device), **names)
    report: dict[str, Any] = {"machine": machine, "model": model, "batch_size": batch_size}
    report |= {"steps": [], "scaling": None}
    table = ""
    for entry in measure(bench, lambda line: typer.echo(line, err=True)):
        report["steps"].append(entry)
        table = f"{machine_line(machine)}; {model}, batch {batch_size}\n\n{as_table(report['steps'])}"
        _write(out / "casm", json.dumps(report, indent=1), table)
    if workers > 1:
        from saltern.pipeline.bench.workers import TrainingBench, training_gain, training_line

        typer.echo(f"1 and {workers} workers", err=True)
        training = TrainingBench(_COMMAND, workers, model, bench.device, batch_size)
        report["scaling"] = training_gain(training)
        table += training_line(report["scaling"], training) + "\n"
        _write(out / "casm", json.dumps(report, indent=1), table)
    _report(out / "casm", table)


def _write(path: Path, report: str, table: str) -> None:
    """Write the report so far, so that an interrupted bench keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(report)
    path.with_suffix(".md").write_text(table)


def _report(path: Path, table: str) -> None:
    typer.echo(table)
    typer.echo(f"wrote {path}.json and {path}.md", err=True)
