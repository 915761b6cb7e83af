"""Judge the sanity of a run's method by the first images of its shards, and keep the results in RUN/metrics.

Shape suffixes: B batch, C H W the network's input.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.extract.extraction import build_method, load_method
from saltern.pipeline.machine import pick_device
from saltern.pipeline.methods import Method
from saltern.pipeline.metrics.controls import sample_seeds
from saltern.pipeline.metrics.sanity.adversarial import judge_attacks
from saltern.pipeline.metrics.sanity.cascade import cascade
from saltern.pipeline.metrics.sanity.plot import plot
from saltern.pipeline.metrics.sanity.verdict import Curves, lines
from saltern.pipeline.runs.manifest import load_run_folder
from saltern.pipeline.runs.reader import Row, SaliencyRun, open_run
from saltern.pipeline.shards.decode import DecodeError, decode
from saltern.schemas.config import ATTACK, ExtractConfig
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.saliency import OK, ZERO_MAP

SUMMARY, PICTURE = "metrics/sanity.json", "metrics/sanity.png"


@dataclass(frozen=True)
class Sanity:
    """The results, as JSON and as lines of text."""

    summary: dict[str, Any]
    lines: list[str]


def sanity(
    path: str,
    images: int,
    *,
    stages: int | None = None,
    patterns: Sequence[str] = (),
    device: str = "auto",
    batch_size: int = 16,
) -> Sanity:
    """Judge the method of an extraction by cascading randomisation, that of an attack by the pixels that it changes.

    Writes RUN/metrics/sanity.json and, for an extraction, RUN/metrics/sanity.png. A stage has one pass of the method
    over each image; all are in float32.

    Args:
        path: the run's folder or URL.
        images: number of images, the first of the run that have a map.
        stages: steps of the cascade, in equal groups of layers; 1: only full randomisation; None: a step a layer.
        patterns: where the run's shards are now, if they were moved.
        device: auto | cpu | cuda.
        batch_size: images of a pass.

    Raises:
        UserError: no run, no image with a map, a shard that cannot be read, or a method that runs another network.
    """
    store, run = load_run_folder(path)
    config = run.config.to_dict()
    head = {name: config[name] for name in ("model", "method", "layer", "options")}
    head = {"run": path, "fingerprint": run.fingerprint, **head}
    if run.config.job == ATTACK:
        attacked = judge_attacks(store, run, images)
        found = Sanity({**head, "adversarial": attacked.summary()}, attacked.lines())
    else:
        curves = _cascades(open_run(path, patterns), images, stages, torch.device(pick_device(device)), batch_size)
        found = Sanity({**head, "seed": config["seed"], **curves.summary()}, list(lines(curves)))
        store.write(PICTURE, plot(curves, f"{config['method']} of {config['model']}"))
    store.write(SUMMARY, json.dumps(found.summary, indent=1).encode())
    return found


def _build(config: ExtractConfig, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Method]]:
    """Return the run's model, and the function that builds its method on a model."""
    model, method = load_method(config, device)
    apart = all(network is not model for network in method.networks())
    method.close()
    if apart:
        raise UserError(f"the maps of {config.method} come from a network of its own, not from {config.model}")

    return model, partial(build_method, config)


def _cascades(run: SaliencyRun, images: int, stages: int | None, device: torch.device, batch_size: int) -> Curves:
    config = run.config
    model, build = _build(config, device)
    curves, chosen = Curves(), islice(_images(run), images)
    while batch := list(islice(chosen, batch_size)):
        rows = [row for row, _ in batch]
        targets = [row.target for row in rows if row.target is not None]
        curves.add(
            cascade(
                model,
                build,
                _normalised(torch.stack([pixels for _, pixels in batch]), config, device),
                torch.tensor(targets, device=device) if len(targets) == len(rows) else None,
                seed_B=sample_seeds(config.seed, [row.key for row in rows]).to(device),
                seed=config.seed,
                stages=stages,
            )
        )
    if not curves.images:
        raise UserError(f"{run.path} has no image with a map; `saltern status {run.path}` says why")
    return curves


def _images(run: SaliencyRun) -> Iterator[tuple[Row, Tensor]]:
    """Yield the first row of each sample that has a map, with its pixels, uint8 (H, W, C)."""
    try:
        for shard in run.shards:
            for sample, rows in run.joined(shard):
                if rows[0].status in (OK, ZERO_MAP) and sample.image is not None:
                    yield rows[0], torch.from_numpy(decode(sample.image, run.config.preprocess).pixels_HWC)
    except (ShardError, DecodeError, OSError) as error:
        raise UserError(f"{error}; if the tars were moved, name them with --shards") from error


def _normalised(pixels_BHWC: Tensor, config: ExtractConfig, device: torch.device) -> Tensor:
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) for values in (config.preprocess.mean, config.preprocess.std)
    )
    return (pixels_BHWC.to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std
