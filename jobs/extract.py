"""saltern extract: shards in, a saliency dataset out."""

from pathlib import Path
from typing import Annotated

import typer

from saltern.jobs import options
from saltern.jobs.options import Model, Shards, Weights, parse_floats, parse_options, read_config


def extract(
    shards: Shards,
    out: Annotated[str, typer.Option(metavar="RUN", help="Folder or URL for what is made.", show_default=False)],
    model: Model,
    method: Annotated[str, typer.Option(help="Saliency method: see `saltern methods`.")],
    weights: Weights = "DEFAULT",
    layer: Annotated[str | None, typer.Option(help="Target layer by dotted name; default: the last stage.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-O", metavar="KEY=VALUE", help="Of the method.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="DIR", help="Of `saltern train-casm`, for --method casm.")
    ] = None,
    target: Annotated[str, typer.Option(help="Class to explain: label, top1, top:N or class:ID.")] = "label",
    discretize: Annotated[str, typer.Option(help="Rule that makes masks: mean:1, otsu, quantile:.9, ...")] = "mean:1",
    map_size: Annotated[str, typer.Option(help="native (the method's grid) or input (upsampled).")] = "native",
    map_dtype: Annotated[str | None, typer.Option(help="uint8, float16 or float32; default: the method's.")] = None,
    no_map: Annotated[bool, typer.Option("--no-map", help="Store masks and boxes only.")] = False,
    engine: options.Engine = "auto",
    address: options.Address = None,
    workers: options.Workers = None,
    gpus_per_worker: options.GpusPerWorker = None,
    decode_threads: Annotated[int | None, typer.Option(min=1, help="Of each worker.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images; default 16 on a CPU, 128 on a GPU.")] = None,
    device: options.Device = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast, channels last).")] = "fp32",
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shorter side before the crop; default: the weights'.")
    ] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the network's input; default: the weights'.")] = None,
    squash: Annotated[bool, typer.Option("--squash", help="Resize whole images to the crop's size.")] = False,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Of RGB in 0..1; default: the weights'.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Of RGB in 0..1; default: the weights'.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    overwrite: options.Overwrite = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Redo samples that are not ok.")] = False,
    shard_timeout: options.ShardTimeout = None,
    max_failed_shards: options.MaxFailedShards = None,
    config: Annotated[
        Path | None, typer.Option(callback=read_config, is_eager=True, help="TOML file with the same keys.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and random methods.")] = 0,
) -> None:
    """Extract saliency maps, masks and boxes. The same command again goes on where the last one ended."""
    from saltern.pipeline.extract.extraction import extraction
    from saltern.pipeline.extract.request import ExtractRequest

    request = ExtractRequest(
        shards=shards,
        model=model,
        method=method,
        weights=weights,
        layer=layer,
        options=parse_options(option or []) | ({} if checkpoint is None else {"checkpoint": checkpoint}),
        target=target,
        discretize=discretize,
        map_size=map_size,
        map_dtype=map_dtype,
        save_map=not no_map,
        resize=resize,
        crop=crop,
        squash=squash,
        mean=parse_floats(mean, "--mean"),
        std=parse_floats(std, "--std"),
        precision=precision,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
    )
    options.drive(
        extraction(request),
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
