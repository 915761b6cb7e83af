"""saltern attack: adversarial images, plain and guided by a saliency map."""

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from saltern.jobs import options
from saltern.jobs.options import Model, Shards, Weights, parse_options, read_config
from saltern.schemas.errors import UserError


def attack(
    shards: Shards,
    out: Annotated[str, typer.Option(metavar="RUN", help="Folder or URL for what is made.", show_default=False)],
    model: Model,
    weights: Weights = "DEFAULT",
    guide: Annotated[str, typer.Option(help="Class-specific saliency method whose map guides.")] = "cameras",
    layer: Annotated[str | None, typer.Option(help="Target layer of the guide; default: the last stage.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-O", metavar="KEY=VALUE", help="Of the guide.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps, from no perturbation on.")] = 80,
    step_size: Annotated[
        str, typer.Option(help="Change of a pixel in a step (normalised: its root mean square); pixels are in 0..1.")
    ] = "1.5/255",
    rule: Annotated[
        str, typer.Option(help="A step is the gradient, normalised for each image, or its sign.")
    ] = "normalised",
    epsilon: Annotated[str, typer.Option(help="Largest change of a pixel.")] = "12/255",
    beta: Annotated[float, typer.Option(min=0, help="Weight of the perturbation outside of the map.")] = 50.0,
    norm: Annotated[str, typer.Option(help="Of that: rms (root of the mean square) or l2 (of the sum).")] = "rms",
    recompute: Annotated[int, typer.Option(min=0, help="Make the map anew every so many steps; 0 = never.")] = 0,
    save_images: Annotated[
        bool, typer.Option("--save-images/--no-save-images", help="Store clean and perturbed images, and attack.png.")
    ] = True,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shorter side before the crop; default: the weights'.")
    ] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the network's input; default: the weights'.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images; default 16 on a CPU, 128 on a GPU.")] = None,
    decode_threads: Annotated[int | None, typer.Option(min=1, help="Of each worker.")] = None,
    engine: options.Engine = "auto",
    address: options.Address = None,
    workers: options.Workers = None,
    gpus_per_worker: options.GpusPerWorker = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Redo samples that are not ok.")] = False,
    shard_timeout: options.ShardTimeout = None,
    max_failed_shards: options.MaxFailedShards = None,
    config: Annotated[
        Path | None, typer.Option(callback=read_config, is_eager=True, help="TOML file with the same keys.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and random guides.")] = 0,
) -> None:
    """Make images that show their least likely class to the model: by plain PGD, and by PGD kept to where the model
    looks. Prints mean fooling confidence and how much smaller the guided perturbation is. The same command again goes
    on where the last one ended.
    """
    from saltern.pipeline.engine.conduct import Job
    from saltern.pipeline.extract.processor import Processor
    from saltern.pipeline.extract.request import ExtractRequest
    from saltern.pipeline.synthesis.attack import Attack, plan
    from saltern.pipeline.synthesis.attack_report import close

    request = ExtractRequest(
        shards=shards,
        model=model,
        method=guide,
        weights=weights,
        layer=layer,
        options=parse_options(option or []),
        resize=resize,
        crop=crop,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        job_options={
            "steps": steps,
            "step_size": _number(step_size, "--step-size"),
            "epsilon": _number(epsilon, "--epsilon"),
            "beta": beta,
            "norm": norm,
            "recompute": recompute,
            "rule": rule,
            "save_images": save_images,
        },
    )
    options.drive(
        Job(partial(plan, request), partial(Processor, task=Attack), close),
        out=out,
        engine=engine,
        address=address,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        decode_threads=decode_threads,
        device=device,
        overwrite=overwrite,
        retry_failed=retry_failed,
        shard_timeout_s=shard_timeout,
        max_failed_shards=max_failed_shards,
    )


def _number(text: str, name: str) -> float:
    """`12/255` or `0.05`."""
    try:
        above, _, below = text.partition("/")
        return float(Fraction(above) / Fraction(below or 1))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{name} {text!r} is no number; give one as 12/255 or 0.05") from None
