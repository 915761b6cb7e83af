"""From what the user asked for to a run: shards named and sized, model and method resolved, every default filled in."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from saltern import __version__
from saltern.pipeline.extract.explain import parse_target
from saltern.pipeline.machine import see_own_modules, torch_threads
from saltern.pipeline.maps.discretize import parse_rule
from saltern.pipeline.methods import Method, build
from saltern.pipeline.models import classifiers
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.choices import MapDtype, MapSize, Precision, check_choice
from saltern.schemas.errors import UserError
from saltern.schemas.run import EXTRACT, PINNED, Run, RunConfig, Shard

BATCH_SIZE = {"cpu": 16, "cuda": 128}
_CHOICES = {"map_size": MapSize, "map_dtype": MapDtype, "precision": Precision}


@dataclass(frozen=True)
class ExtractRequest:
    """What the user asked for; None where the default, or the standing run, decides."""

    shards: Sequence[str]
    model: str
    method: str
    weights: str = "DEFAULT"
    layer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    target: str = "label"
    discretize: str = "mean:1"
    map_size: str = "native"
    map_dtype: str | None = None
    save_map: bool = True
    resize: int | None = None
    crop: int | None = None
    squash: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    precision: str = "fp32"
    seed: int = 0
    limit: int | None = None
    batch_size: int | None = None
    torch_threads: int | None = None
    job: str = EXTRACT
    job_options: dict[str, Any] = field(default_factory=dict)  # complete


def resolve(request: ExtractRequest, standing: Run | None, device: str, workers: int) -> tuple[Run, list[str]]:
    """The run that is asked for, and hints for the user in words.

    Args:
        standing: the run in the folder, whose batch size and threads are reused where the request leaves them open.
        device: cpu | cuda, which decides their defaults.
        workers: on this machine; they share its cores.

    Raises:
        UserError: anything that was asked for cannot be had.
    """
    for key, choices in _CHOICES.items():
        if getattr(request, key) is not None:
            check_choice(f"--{key.replace('_', '-')}", getattr(request, key), choices)
    parse_rule(request.discretize)
    shards, hints = expand(request.shards)
    shards = limited(shards, request.limit)
    given = {key: getattr(request, key) for key in PINNED}
    config, class_names = _config(request, pin(given, standing, device, workers))
    return new_run(config, shards, class_names), hints


def pin(
    given: Mapping[str, int | None],
    standing: Run | None,
    device: str,
    workers: int,
    usual: Mapping[str, int] = BATCH_SIZE,
) -> dict[str, Any]:
    """Batch size and torch threads: as given, else those of the standing run, else the usual size on such
    a device, and the threads that this machine has."""
    there = {key: getattr(standing.config, key) for key in PINNED} if standing else {}
    pinned = {key: given.get(key) or there.get(key) for key in PINNED}
    pinned["batch_size"] = pinned["batch_size"] or usual[device]
    pinned["torch_threads"] = pinned["torch_threads"] or torch_threads(device, workers)
    return pinned


def new_run(config: RunConfig, shards: list[Shard], class_names: list[str] | None) -> Run:
    """The run with its fingerprint and the versions that it is made with."""
    installed = {name: version(name) for name in ("torch", "torchvision", "pyarrow", "pillow", "numpy")}
    versions = {"saltern": __version__, **installed}
    return Run(config, shards, versions, config.fingerprint(), class_names)


def limited(shards: list[Shard], limit: int | None) -> list[Shard]:
    """The shards that hold the first `limit` samples, the last with the share of it that is wanted."""
    if limit is None:
        return shards
    if limit < 1:
        raise UserError(f"--limit {limit}: at least one sample is needed")
    wanted: list[Shard] = []
    for shard in shards:
        held = len(list_keys(shard))
        wanted.append(shard if held <= limit else replace(shard, take=limit))
        limit -= held
        if limit <= 0:
            break
    return wanted


def _config(request: ExtractRequest, pinned: dict[str, Any]) -> tuple[RunConfig, list[str] | None]:
    see_own_modules()
    classifier = classifiers.load(request.model, request.weights, seed=request.seed)
    parse_target(request.target, classifier.classes)
    method = build(request.method, classifier.model, layer=request.layer, **request.options)
    method.close()
    if len(method.layer) > 1:
        raise UserError(f"{request.method} was built on {len(method.layer)} layers; a run stores one map: give --layer")
    usual = classifier.preprocess
    config = RunConfig(
        model=request.model,
        weights=absolute(request.weights),
        weights_digest=classifier.digest,
        classes=classifier.classes,
        method=request.method,
        layer=list(method.layer),
        options=dict(method.options),
        target=request.target,
        discretize=request.discretize,
        map_size=request.map_size,
        map_dtype=_map_dtype(request, method),
        save_map=request.save_map,
        resize=request.resize or usual.resize,
        crop=request.crop or usual.crop,
        squash=request.squash,
        interpolation=usual.interpolation,
        mean=list(request.mean or usual.mean),
        std=list(request.std or usual.std),
        precision=request.precision,
        seed=request.seed,
        limit=request.limit,
        job=request.job,
        job_options=request.job_options,
        **pinned,
    )
    _check(config)
    return config, classifier.class_names


def absolute(weights: str) -> str:
    """A file is found from any folder; a name stays as it is."""
    return os.path.abspath(weights) if os.path.isfile(weights) else weights


def _map_dtype(request: ExtractRequest, method: Method) -> str:
    if request.map_dtype is not None:
        return request.map_dtype
    return "uint8" if request.map_size == "input" else method.default_map_dtype


def _check(config: RunConfig) -> None:
    if config.crop < 1 or (not config.squash and config.resize < config.crop):
        raise UserError(f"--resize {config.resize} is smaller than --crop {config.crop}: the crop would be padded")
    for key in ("mean", "std"):
        if len(getattr(config, key)) != 3:
            raise UserError(f"--{key} takes three numbers, for R,G,B")
    if min(config.std) <= 0:
        raise UserError("--std: each number must be larger than 0")
    if config.batch_size < 1 or config.torch_threads < 1:
        raise UserError("--batch-size must be at least 1")
