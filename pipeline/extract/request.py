"""Turn a request into a run: list the shards, load model and method, fill in every default."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from saltern.pipeline.extract.compilation import choose_compile
from saltern.pipeline.extract.labels import AUTO, Numbers, choose_labels, numbers_in_order
from saltern.pipeline.extract.prompts import choose_prompts
from saltern.pipeline.extract.tryout import is_proven, try_extract
from saltern.pipeline.machine import torch_threads
from saltern.pipeline.masknet.checkpoint import newer_than
from saltern.pipeline.methods import Method, build, find
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.classifiers import Classifier, needs_prompts
from saltern.pipeline.models.presets import adapt
from saltern.pipeline.naming import located
from saltern.pipeline.runs.begin import new_run
from saltern.pipeline.shards.decoder import choose_decoder, describe_decoder
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.shards.samples import list_keys
from saltern.schemas.choices import Compile, MapDtype, MapSize, Precision, check_choice
from saltern.schemas.config import ExtractConfig, MethodConfig
from saltern.schemas.errors import ShardError, UserError
from saltern.schemas.prompts import Prompts
from saltern.schemas.rules import Finer, Rule, Target
from saltern.schemas.run import Run, Shard
from saltern.schemas.sizes import Side

BATCH_SIZE = {"cpu": 16, "cuda": 128}
_CHOICES = {"map_size": MapSize, "map_dtype": MapDtype, "precision": Precision, "compile": Compile}


@dataclass(frozen=True)
class MethodRequest:
    """Options of a job that takes images through a saliency method. None = the existing run's value, or the default."""

    shards: Sequence[str]  # paths, URLs, globs, folders or @lists
    model: str
    method: str
    weights: str = "DEFAULT"
    prompts: str | Sequence[str] | None = None  # texts, also with commas between, or a file; None: the class names
    templates: str | Sequence[str] | None = None  # with {} for a prompt, or files of them
    layer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    resize: int | None = None
    crop: Side | None = None
    squash: bool | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    seed: int = 0
    limit: int | None = None  # samples
    batch_size: int | None = None
    torch_threads: int | None = None
    deterministic: bool | None = None
    image_member: str | None = None  # extension
    label_member: str | None = None  # extension, or json:KEY
    decode: str = "auto"  # auto | cpu | gpu


@dataclass(frozen=True)
class ExtractRequest(MethodRequest):
    """Options of `extract`."""

    target: str = "label"  # label | top1 | top:N | class:ID | prompt:NAME
    discretize: str | None = None  # None: the method's
    map_size: str = "native"  # native | input
    map_dtype: str | None = None  # uint8 | float16 | float32
    save_map: bool = True
    precision: str = "fp32"  # fp32 | tf32 | bf16 | fp16
    labels: str = AUTO  # auto | as-is | a JSON file from the dataset's classes to the model's
    compile: str = "auto"  # auto | on | off


@dataclass(frozen=True)
class Inputs:
    """What a request names, found and loaded."""

    shards: list[Shard]
    hints: list[str]
    classifier: Classifier
    own_names: bool = False  # the classes are the dataset's, as their names are the prompts


def find_inputs(request: MethodRequest, existing: Run | None) -> Inputs:
    """Return the shards and the classifier of a request. Raises UserError if one is not available.

    Args:
        existing: the run in the folder; its embeddings are used if its prompts and its weights are the requested ones.
    """
    shards, hints = wanted_shards(request)
    prompts, own_names, said = choose_prompts(request.prompts, request.templates or (), shards, request.model)
    held = existing.config.prompts if existing else None
    same = held if held is not None and prompts is not None and held.same_texts(prompts) else None
    classifier = load_classifier(request.model, request.weights, request.seed, request.crop, same or prompts)
    if same and existing and classifier.digest != existing.config.weights_digest:  # another model's embeddings
        classifier = load_classifier(request.model, request.weights, request.seed, request.crop, prompts)
    return Inputs(shards, [*hints, *said], classifier, own_names)


def resolve(
    request: ExtractRequest,
    existing: Run | None,
    device: str,
    workers: int,
    *,
    inputs: Inputs | None = None,
    sibling: Run | None = None,
) -> tuple[Run, list[str]]:
    """Return the requested run, and hints for the user.

    Args:
        existing: the run in the folder; its batch size and threads are the defaults.
        device: cpu | cuda, which decides their defaults.
        workers: on this machine; they share its cores.
        inputs: of the request, if they are loaded already.
        sibling: a run of another method that is made together with this one; its batch size, threads, decoder and
            labels are the defaults if there is no existing run.

    Raises:
        UserError: an option is invalid, or a shard, the model or the method is not available.
    """
    for key, choices in _CHOICES.items():
        if getattr(request, key) is not None:
            check_choice(f"--{key.replace('_', '-')}", getattr(request, key), choices)
    if not request.save_map and (request.map_dtype or request.map_size != "native"):
        raise UserError("--map-dtype and --map-size have no effect with --no-map; leave one of them out")
    kind = find(request.method)
    rule = Rule.parse(request.discretize or kind.default_rule)
    inputs = inputs or find_inputs(request, existing or sibling)
    shards, classifier = inputs.shards, inputs.classifier
    target = Target.parse(request.target, classifier.classes, classifier.prompts.names if classifier.prompts else ())
    fields, method = method_fields(request, classifier, existing or sibling, device, workers, target.finer)
    labels, remarks = _labels(request, existing or sibling, inputs, needed=target.kind == "label")
    compiled, why = choose_compile(request, existing, method, sum(shard.size for shard in shards) // workers, device)
    fields["map_dtype"] = request.map_dtype or ("uint8" if request.map_size == "input" else fields["map_dtype"])
    config = ExtractConfig(
        **fields,
        target=target,
        discretize=rule,
        map_size=request.map_size,
        save_map=request.save_map,
        precision=request.precision,
        labels=labels,
        compile=compiled,
    )
    if not is_proven(config, existing):
        try_extract(method, config, device)
    method.close()
    idle = not kind.needs_target and request.target not in ("label", "top1")
    said = [
        why,
        *[f"--target {request.target} has no effect on {request.method}, which explains no class"] * idle,
        *describe_decoder(config.decoder, device),
        *inputs.hints,
        *remarks,
        *_newer_checkpoint(request, config),
    ]
    return new_run(config, shards, classifier.class_names), said


def _newer_checkpoint(request: ExtractRequest, config: ExtractConfig) -> list[str]:
    """Return a hint if the run keeps a checkpoint, and its training has a newer one."""
    newer = newer_than(Path(str(request.options.get("checkpoint"))), Path(config.checkpoint or ""))
    if config.checkpoint is None or newer is None:
        return []
    return [f"the run uses {config.checkpoint}, as it began; {newer} is newer: --overwrite or another --out takes that"]


def _member(option: str, given: str | None) -> str | None:
    """Return the extension of a member as `split_name` gives it. Raises UserError if it is none."""
    if given is None:
        return None
    ext, colon, key = given.partition(":")
    ext = ext.removeprefix(".").lower()
    is_key = bool(key) and ext == "json" and option == "--label-member"
    if not ext or "/" in ext or (colon and not is_key):
        keyed = ", or json:KEY for a number in the json member" if option == "--label-member" else ""
        raise UserError(f"{option} {given}: give the extension of a member, such as image.jpg or txt{keyed}")
    return f"{ext}{colon}{key}"


def _labels(
    request: ExtractRequest, existing: Run | None, inputs: Inputs, *, needed: bool
) -> tuple[Numbers, list[str]]:
    """Return the existing run's labels if the request leaves them open, else as `choose_labels`."""
    if request.labels == AUTO and existing is not None and isinstance(existing.config, ExtractConfig):
        return existing.config.labels, []
    if request.labels == AUTO and inputs.own_names:
        return numbers_in_order(inputs.shards), []
    needed, prompts = needed and find(request.method).needs_target, inputs.classifier.prompts
    names, classes = inputs.classifier.class_names, inputs.classifier.classes
    fix = "explain the model's own choice with --target top1, "
    if prompts is not None and needs_prompts(request.model):
        fix = f"leave out --prompts, whose default are the dataset's classes, {fix}"
    labels, said = choose_labels(request.labels, inputs.shards, names, classes, needed=needed, fix=fix)
    return labels, said if labels or not prompts else []  # prompts need not be the dataset's classes


def wanted_shards(request: MethodRequest) -> tuple[list[Shard], list[str]]:
    """Return the shards that the request names, up to its limit, and hints for the user."""
    shards, hints = expand(request.shards)
    return limited(shards, request.limit), hints


def limited(shards: list[Shard], limit: int | None) -> list[Shard]:
    """Return the shards that hold the first `limit` samples. Of the last shard, only the first samples are taken."""
    if limit is None:
        return shards
    if limit < 1:
        raise UserError(f"--limit {limit}: at least one sample is needed")
    wanted: list[Shard] = []
    for shard in shards:
        with reading():
            samples = len(list_keys(shard))
        wanted.append(shard if samples <= limit else replace(shard, take=limit))
        limit -= samples
        if limit <= 0:
            break
    return wanted


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Raise UserError if a shard cannot be read."""
    try:
        yield
    except (OSError, ShardError) as error:
        raise UserError(f"a shard cannot be read: {error}") from error


def load_classifier(
    model: str, weights: str, seed: int, side: Side | None, prompts: Prompts | None = None
) -> Classifier:
    """Load the classifier that the user named, for images of `side` pixels; None = that of the weights."""
    return classifiers.load(model, weights, seed=seed, side=side, prompts=prompts)


def method_fields(
    request: MethodRequest,
    classifier: Classifier,
    existing: Run | None,
    device: str,
    workers: int,
    finer: Finer | None = None,
) -> tuple[dict[str, Any], Method]:
    """Return the fields of the request's MethodConfig, with the method's own map dtype, and the method."""
    preprocess = adapt(
        classifier.preset,
        resize=request.resize,
        crop=request.crop,
        squash=request.squash,
        mean=request.mean,
        std=request.std,
    )
    held = _held_options(request, existing)
    options = dict(request.options)
    if "checkpoint" in options and "digest" in held:  # that of the run, also if the training has newer ones
        options.setdefault("digest", held["digest"])
    method = build(
        request.method, classifier.model, layer=request.layer, input_side=preprocess.crop, finer=finer, **options
    )
    if len(method.layer) > 1:
        raise UserError(f"{request.method} was built on {len(method.layer)} layers; a run stores one map: give --layer")
    pinned = pin(request, existing, device, workers)
    if pinned["batch_size"] < 1 or pinned["torch_threads"] < 1:
        raise UserError("--batch-size must be at least 1")
    options = dict(method.options)
    checkpoint = None if "checkpoint" in held else options.pop("checkpoint", None)
    fields = {
        **model_fields(classifier, request.model, request.weights, request.seed),
        **pinned,
        "preprocess": preprocess,
        "method": request.method,
        "layer": list(method.layer),
        "options": options,
        "checkpoint": checkpoint,
        "map_dtype": method.default_map_dtype,
        "limit": request.limit,
        "decoder": choose_decoder(request.decode, device, _decoder(existing)),
        "image_member": _member("--image-member", request.image_member),
        "label_member": _member("--label-member", request.label_member),
    }
    return fields, method


def _decoder(existing: Run | None) -> str | None:
    return existing.config.decoder if existing and isinstance(existing.config, MethodConfig) else None


def _held_options(request: MethodRequest, existing: Run | None) -> Mapping[str, Any]:
    """Return the existing run's options of the requested method."""
    config = existing.config if existing else None
    return config.options if isinstance(config, MethodConfig) and config.method == request.method else {}


def model_fields(classifier: Classifier, model: str, weights: str, seed: int) -> dict[str, Any]:
    """Return the fields of a RunConfig that name the model."""
    return {
        "model": located(model),
        "weights": absolute(weights),
        "weights_digest": classifier.digest,
        "classes": classifier.classes,
        "prompts": classifier.prompts,
        "seed": seed,
    }


def absolute(weights: str) -> str:
    """Return a file of weights as an absolute path, and the name of weights unchanged."""
    return os.path.abspath(weights) if os.path.isfile(weights) else weights


class Pinned(Protocol):
    """A request's settings that change last bits. None = the existing run's value, or the default."""

    @property
    def batch_size(self) -> int | None: ...
    @property
    def torch_threads(self) -> int | None: ...
    @property
    def deterministic(self) -> bool | None: ...


def pin(
    request: Pinned, existing: Run | None, device: str, workers: int, usual: Mapping[str, int] = BATCH_SIZE
) -> dict[str, Any]:
    """Return the settings that change last bits: the requested, else the existing run's, else the device's defaults."""
    config = existing.config if existing else None
    chosen = request.deterministic
    return {
        "batch_size": request.batch_size or (config.batch_size if config else usual[device]),
        "torch_threads": request.torch_threads or (config.torch_threads if config else torch_threads(device, workers)),
        "deterministic": chosen if chosen is not None else config.deterministic if config else True,
    }
