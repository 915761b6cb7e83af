"""saltern unseen-classes: masks for objects of classes that were left out of the training."""

from pathlib import Path
from typing import Annotated

import typer

from saltern.jobs import options
from saltern.jobs.options import AsJson, Model, Shards, Weights
from saltern.jobs.train_casm import parse_classes, parse_lambda


def unseen_classes(
    shards: Shards,
    val: Annotated[
        list[str], typer.Option(metavar="SHARDS", help="With boxes, to judge by; may be repeated.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for all that is made.", show_default=False)],
    model: Model,
    weights: Weights = "DEFAULT",
    thinning: Annotated[str, typer.Option(help="Which classifiers judge: F, L, FL, L1000 or L100.")] = "L",
    classes: Annotated[
        str | None, typer.Option(metavar="FILE|A,B,...", help="Numbers of the classes to split; default: all there.")
    ] = None,
    lam: Annotated[
        str | None,
        typer.Option("--lambda", help="Weight of the penalty on size, or auto; default: resnet50's, else auto."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 60,
    steps_per_epoch: Annotated[int | None, typer.Option(min=1, help="Default: a fifth of the data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a training's step.")] = 128,
    side: Annotated[
        int | None,
        typer.Option(min=1, help="Of the network's input, and of images to judge by; default: the weights'."),
    ] = None,
    min_crop: Annotated[float, typer.Option(help="Share of an image that a random crop covers, at least.")] = 0.08,
    device: options.Device = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Of a training: data-parallel, on Ray.")] = 1,
    gpus_per_worker: options.GpusPerWorker = None,
    address: options.Address = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of the split and all else that is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Split the classes into A to F, train CASM on F, E+F, D-F, C-F and B-F, and print LE on every subset. The same
    command again goes on where the last one ended, with the same result.
    """
    import json

    from saltern.pipeline.casm.algorithm.settings import Settings, usual_lambda
    from saltern.pipeline.casm.algorithm.thinning import thinning_named
    from saltern.pipeline.casm.training.train import Request
    from saltern.pipeline.casm.unseen.experiment import unseen_classes as experiment

    request = Request(
        shards=shards,
        out=str(out),
        model=model,
        settings=Settings(
            thinning=thinning_named(thinning),
            lam=usual_lambda(model) if lam is None else parse_lambda(lam),
            precision=precision,
            seed=seed,
        ),
        weights=weights,
        classes=None if classes is None else parse_classes(classes),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        side=side,
        min_crop=min_crop,
        device=device,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        address=address,
    )
    try:
        found = experiment(request, val)
    except KeyboardInterrupt:
        typer.echo("what stands is kept: the same `saltern unseen-classes` command goes on from here", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(found.summary(), indent=1))
    else:
        typer.echo(found.table())
        typer.echo(found.remarks())
