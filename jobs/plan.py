"""saltern plan: what a run would take. Starts nothing."""

from typing import Annotated

import typer

from saltern.jobs.options import AsJson, Shards, parse_options


def plan(
    shards: Shards,
    model: Annotated[str | None, typer.Option(help="As for extract; without one nothing is tried.")] = None,
    method: Annotated[str, typer.Option(help="Saliency method: see `saltern methods`.")] = "grad-cam",
    weights: Annotated[str, typer.Option(help="As for extract.")] = "DEFAULT",
    layer: Annotated[str | None, typer.Option(help="As for extract.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-O", metavar="KEY=VALUE", help="Of the method.")
    ] = None,
    map_size: Annotated[str, typer.Option(help="native or input.")] = "native",
    map_dtype: Annotated[str | None, typer.Option(help="uint8, float16 or float32.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="To plan with, each like this machine's.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Count shards and samples, and estimate hours and bytes from a few dozen images; no run is started."""
    import json
    from dataclasses import asdict

    from saltern.pipeline.extract.estimate import estimate
    from saltern.pipeline.extract.request import ExtractRequest

    request = ExtractRequest(
        shards=shards,
        model=model or "",
        method=method,
        weights=weights,
        layer=layer,
        options=parse_options(option or []),
        target="top1",
        map_size=map_size,
        map_dtype=map_dtype,
        precision=precision,
        batch_size=batch_size,
    )
    found, hints = estimate(request, device, workers)
    for line in hints:
        typer.echo(line, err=True)
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else found.table())
