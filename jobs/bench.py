"""saltern bench: rates, memory and sizes against what each is held to."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure, against the limit that each figure is held to.", no_args_is_help=True)


@app.command()
def extract(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for extract.json and extract.md.")] = Path("bench"),
    shards: Annotated[
        list[str] | None, typer.Option(help="Shards to measure on, as for extract; default: some are made.")
    ] = None,
    model: Annotated[str, typer.Option(help="As for extract.")] = "resnet50",
    weights: Annotated[str, typer.Option(help="As for extract; random ones take as long.")] = "none",
    method: Annotated[str, typer.Option(help="As for extract.")] = "grad-cam",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images; default 16 on a CPU, 128 on a GPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Of each figure; its value is of the medians.")] = 5,
) -> None:
    """The whole run against its limits, the engines, memory, resume, bytes. About ten minutes on two cores."""
    from dataclasses import asdict

    from saltern.pipeline.bench.extract import measure
    from saltern.pipeline.bench.figures import as_json, as_markdown, describe_machine
    from saltern.pipeline.bench.workload import Settings
    from saltern.pipeline.engine.selection import select_engine
    from saltern.pipeline.machine import pick_device

    settings = Settings(
        command=[sys.executable, "-m", "saltern"],
        shards=shards or [],
        model=model,
        weights=weights,
        method=method,
        precision=precision,
        batch_size=batch_size,
        device=pick_device(device),
        rounds=rounds,
    )
    machine = describe_machine()
    figures = measure(settings, lambda: select_engine("ray", "cpu", None, 2, 0.0))
    table = as_markdown(figures, machine)
    out.mkdir(parents=True, exist_ok=True)
    (out / "extract.json").write_text(as_json(figures, asdict(settings), machine))
    (out / "extract.md").write_text(table)
    typer.echo(table)
    typer.echo(f"{out}/extract.json and .md hold the same, with every round", err=True)


@app.command()
def methods(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for methods.json and methods.md.")] = Path("bench"),
    model: Annotated[str, typer.Option(help="As for extract, with random weights.")] = "resnet50",
    batch_size: Annotated[int, typer.Option(min=1, help="Images; costly methods take fewer.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    only: Annotated[list[str] | None, typer.Option(help="Only this method; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each side; figures are of the medians.")] = 5,
) -> None:
    """Every method against its forwards and backwards, its peers, and in bf16. About twenty minutes on two cores."""
    import json

    from saltern.pipeline.bench.figures import describe_machine
    from saltern.pipeline.bench.methods import Bench, as_table, measure
    from saltern.pipeline.machine import pick_device
    from saltern.pipeline.methods import find

    for name in only or ():
        find(name)
    machine = describe_machine()
    bench = Bench(model, pick_device(device), batch_size, rounds, tuple(only or ()))
    out.mkdir(parents=True, exist_ok=True)
    entries, table = [], ""
    for entry in measure(bench, lambda line: typer.echo(line, err=True)):
        entries.append(entry)  # written at once: a bench that is stopped keeps what it has
        table = f"{_where(machine)}; {model}, batch {batch_size}, float32, 224 x 224\n\n{as_table(entries)}"
        (out / "methods.json").write_text(json.dumps({"machine": machine, "cases": entries}, indent=1))
        (out / "methods.md").write_text(table)
    typer.echo(table)
    typer.echo(f"{out}/methods.json and .md hold the same, with every round", err=True)


@app.command()
def casm(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for casm.json and casm.md.")] = Path("bench"),
    model: Annotated[str, typer.Option(help="As for train-casm, with random weights.")] = "resnet50",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Of each side; figures are of the medians.")] = 5,
    thinning: Annotated[list[str] | None, typer.Option(help="Repeatable; default: F, L and L100.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Of a training beside one of 1 worker; 1: none is made.")] = 2,
) -> None:
    """CASM's training step against its forwards and backwards; what a second worker gains. Half an hour, two cores."""
    import json

    from saltern.pipeline.bench.casm import Bench, as_table, measure
    from saltern.pipeline.bench.figures import describe_machine
    from saltern.pipeline.machine import pick_device, see_own_modules

    see_own_modules()
    machine = describe_machine()
    bench = Bench(model, pick_device(device), batch_size, rounds, *([tuple(thinning)] if thinning else []))
    report, table = {"machine": machine, "model": model, "batch_size": batch_size, "steps": [], "scaling": None}, ""

    def write() -> None:
        (out / "casm.json").write_text(json.dumps(report, indent=1))
        (out / "casm.md").write_text(table)

    out.mkdir(parents=True, exist_ok=True)
    for entry in measure(bench, lambda line: typer.echo(line, err=True)):
        report["steps"].append(entry)  # written at once: a bench that is stopped keeps what it has
        table = f"{_where(machine)}; {model}, batch {batch_size}\n\n{as_table(report['steps'])}"
        write()
    if workers > 1:
        from saltern.pipeline.bench import scaling

        typer.echo(f"1 and {workers} workers", err=True)
        what = scaling.Scaling([sys.executable, "-m", "saltern"], workers, model, bench.device, batch_size)
        report["scaling"] = scaling.measure(what)
        table += scaling.as_line(report["scaling"], what) + "\n"
        write()
    typer.echo(table)
    typer.echo(f"{out}/casm.json and .md hold the same, with every round", err=True)


def _where(machine: dict[str, Any]) -> str:
    return f"{machine['gpu'] or machine['cpu']}, torch {machine['versions']['torch']}, {machine['date']}"
