"""saltern train-casm: a mask network that answers to no single classifier."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saltern.jobs import options
from saltern.jobs.options import Model, Shards, Weights, read_config
from saltern.schemas.errors import UserError

if TYPE_CHECKING:
    from saltern.pipeline.casm.algorithm.settings import Settings


def train_casm(
    shards: Shards,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints, pool and log.", show_default=False)],
    model: Model,
    weights: Weights = "DEFAULT",
    thinning: Annotated[str, typer.Option(help="Which classifiers judge: F, L, FL, L1000 or L100.")] = "L100",
    pool_size: Annotated[int, typer.Option(min=1, help="Past classifiers kept at most.")] = 30,
    pool_half: Annotated[bool, typer.Option("--pool-half", help="Keep their weights in 16 bits.")] = False,
    score: Annotated[str, typer.Option(help="entropy or classification.")] = "entropy",
    lam: Annotated[
        str | None,
        typer.Option("--lambda", help="Weight of the penalty on size, or auto; default: resnet50's, else auto."),
    ] = None,
    mask_area: Annotated[float, typer.Option(help="Mean mask that --lambda auto steers to.")] = 0.5,
    epochs: Annotated[int, typer.Option(min=1, help="Learning rates fall to a tenth after each third.")] = 60,
    steps_per_epoch: Annotated[int | None, typer.Option(min=1, help="Default: a fifth of the data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step, of all workers together.")] = 128,
    side: Annotated[int | None, typer.Option(min=1, help="Of the network's input; default: the weights'.")] = None,
    min_crop: Annotated[float, typer.Option(help="Share of an image that a random crop covers, at least.")] = 0.08,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE|A,B,...", help="Numbers of the classes to train on; default: all.")
    ] = None,
    share_encoder: Annotated[
        bool, typer.Option("--share-encoder/--no-share-encoder", help="Masks from the classifier's own trunk.")
    ] = True,
    classifier_loss: Annotated[
        str, typer.Option(help="sequential (clean, then masked) or sum (eq. 8).")
    ] = "sequential",
    batch_norm: Annotated[str, typer.Option(help="train, or eval: running statistics everywhere.")] = "train",
    tv: Annotated[float, typer.Option(min=0, help="Weight of the masks' total variation.")] = 0.0,
    init_scale: Annotated[float, typer.Option(min=0, help="Of the mask network's last weights at the start.")] = 1.0,
    lr_classifier: Annotated[float, typer.Option(min=0, help="Of SGD.")] = 1e-3,
    lr_mask: Annotated[float, typer.Option(min=0, help="Of Adam.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of both.")] = 1e-4,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps; default: an epoch.")] = None,
    decode_threads: Annotated[int | None, typer.Option(min=1, help="Default: one a core, at most 16.")] = None,
    device: options.Device = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Data-parallel, on Ray; 1 works in this process.")] = 1,
    gpus_per_worker: options.GpusPerWorker = None,
    pool_draw: Annotated[str, typer.Option(help="shared: one past classifier for all workers; per-rank.")] = "shared",
    address: options.Address = None,
    val: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARDS", help="With boxes: LE, F1 and a page of masks after each epoch; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")] = False,
    config: Annotated[
        Path | None, typer.Option(callback=read_config, is_eager=True, help="TOML file with the same keys.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Train a mask network on a classifier's trunk (CASM). `saltern extract --method casm --checkpoint DIR` uses it.
    Stopped at any moment, the same command with --resume ends with the same weights, bit for bit.
    """
    from saltern.pipeline.casm.algorithm.settings import usual_lambda
    from saltern.pipeline.casm.training.train import Request, train

    settings = _settings(
        thinning,
        lam=usual_lambda(model) if lam is None else parse_lambda(lam),
        score=score,
        mask_area=mask_area,
        pool_size=pool_size,
        pool_half=pool_half,
        pool_draw=pool_draw,
        classifier_loss=classifier_loss,
        share_encoder=share_encoder,
        init_scale=init_scale,
        tv=tv,
        batch_norm=batch_norm,
        precision=precision,
        lr_classifier=lr_classifier,
        lr_mask=lr_mask,
        weight_decay=weight_decay,
        seed=seed,
    )
    made = train(
        Request(
            shards=shards,
            out=str(out),
            model=model,
            settings=settings,
            weights=weights,
            classes=None if classes is None else parse_classes(classes),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch_size,
            side=side,
            min_crop=min_crop,
            checkpoint_every=checkpoint_every,
            decode_threads=decode_threads,
            device=device,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            address=address,
            val=val or (),
            resume=resume,
        )
    )
    typer.echo(f"{made} stands; saltern extract ... --model {model} --method casm --checkpoint {out}")


def _settings(thinning: str, **given: Any) -> "Settings":
    from saltern.pipeline.casm.algorithm.settings import Settings
    from saltern.pipeline.casm.algorithm.thinning import thinning_named

    return Settings(thinning=thinning_named(thinning), **given)


def parse_lambda(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--lambda {text!r} is neither a number nor auto") from None


def parse_classes(text: str) -> list[int]:
    """`A,B,...`, or a file with numbers, apart by commas, spaces or lines."""
    try:
        listed = re.fullmatch(r"[\d\s,]+", text) is not None
        words = text if listed else Path(text).read_text()
        return [int(word) for word in re.split(r"[\s,]+", words.strip())]
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {text!r} is no list of numbers, nor a file of them: {error}") from None
