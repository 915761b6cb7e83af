"""From what the user asked for to a training that can begin: all that can be wrong is found here."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.data.batches import LEAST
from saltern.pipeline.casm.data.index import Index, make_index
from saltern.pipeline.extract.request import absolute
from saltern.pipeline.machine import cores, see_own_modules, torch_threads
from saltern.pipeline.masknet.checkpoint import Checkpoint
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.models import classifiers
from saltern.pipeline.shards.expand import expand
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard

SHARE = 5  # an epoch is a fifth of the data, as published
_FREE = ("workers", "torch_threads")  # may differ on a resume; the last bits then do


@dataclass(frozen=True)
class TrainRequest:
    """What the user asked for; None where a default decides."""

    shards: Sequence[str]
    out: str
    model: str
    hyperparameters: Hyperparameters  # its steps follow from the epochs
    weights: str = "DEFAULT"
    classes: Sequence[int] | None = None  # in play; None: all
    val: Sequence[str] = ()  # shards with boxes, measured after each epoch
    epochs: int = 60
    steps_per_epoch: int | None = None
    batch_size: int = 128  # of all workers together
    side: int | None = None  # of the network's input
    min_crop: float = LEAST  # share of the image that a random crop covers, at least
    checkpoint_every: int | None = None  # steps; None: an epoch
    decode_threads: int | None = None  # of a worker
    device: str = "auto"
    workers: int = 1
    gpus_per_worker: float | None = None
    address: str | None = None  # of a Ray cluster; None: $RAY_ADDRESS, or none
    resume: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """A training, checked: what each of its ranks is given."""

    root: Path
    weights: str
    hyperparameters: Hyperparameters
    index: Index
    val: Sequence[Shard]
    each: int  # steps of an epoch
    threads: int  # that decode
    config: dict[str, Any]  # of the checkpoints


def make_plan(
    request: TrainRequest, device: str, standing: Checkpoint | None, say: Callable[[str], None]
) -> TrainingPlan:
    """What the request asks for, with every default filled in.

    Args:
        device: cpu | cuda, of the workers.
        standing: the checkpoint to go on from.

    Raises:
        UserError: anything that was asked for cannot be had, or differs from what stands.
    """
    _check(request)
    see_own_modules()
    shards, hints = expand(request.shards)
    val, more = expand(request.val) if request.val else ([], [])
    for hint in (*hints, *more):
        say(hint)
    classifier = classifiers.load(request.model, request.weights, seed=request.hyperparameters.seed)
    if request.classes is not None:
        restrict(classifier.model, request.classes)
    find_stages(classifier.model)
    index = make_index(shards, classifier.classes, request.classes)
    each = request.steps_per_epoch or -(-len(index) // (SHARE * request.batch_size))
    hyperparameters = replace(request.hyperparameters, steps=request.epochs * each)
    config = {
        **_config(request, classifier, hyperparameters),
        "checkpoint_every": request.checkpoint_every or each,
        "samples": len(index),
        "shards": [[shard.name, shard.size] for shard in shards],
        "device": device,
        "workers": request.workers,
        "torch_threads": torch_threads(device, request.workers),
    }
    root = Path(request.out).absolute()
    if standing is not None:
        config = _same(standing, config, root, say)
    threads = request.decode_threads or max(1, min(cores() // request.workers, 16))
    return TrainingPlan(root, absolute(request.weights), hyperparameters, index, val, each, threads, config)


def _config(
    request: TrainRequest, classifier: classifiers.Classifier, hyperparameters: Hyperparameters
) -> dict[str, Any]:
    """What a resume must be asked for again, and what whoever uses the masks has to know; JSON."""
    usual = classifier.preprocess
    return {
        "model": request.model,
        "weights_digest": classifier.digest,
        "model_classes": classifier.classes,
        "classes": None if request.classes is None else list(request.classes),
        "settings": {**asdict(hyperparameters), "thinning": hyperparameters.thinning.name},
        "steps": hyperparameters.steps,
        "batch_size": request.batch_size,
        "resize": request.side or usual.resize,  # of validation images, as extract has it
        "side": request.side or usual.crop,
        "interpolation": usual.interpolation,
        "min_crop": request.min_crop,
        "mean": list(usual.mean),
        "std": list(usual.std),
    }


def _check(request: TrainRequest) -> None:
    for name in ("epochs", "steps_per_epoch", "batch_size", "side", "checkpoint_every", "decode_threads", "workers"):
        given = getattr(request, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} {given}: it must be 1 or more")
    if request.batch_size % request.workers:
        raise UserError(f"--batch-size {request.batch_size} is of all workers, and {request.workers} cannot share it")
    if not 0 < request.min_crop <= 1:
        raise UserError(f"--min-crop {request.min_crop}: it is a share of the image, more than 0 and at most 1")


def _same(standing: Checkpoint, config: dict[str, Any], root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The config to go on with: as asked for, with the threads that it began with. Raises UserError if it differs."""
    there, asked = ({**held, **held["settings"], "settings": None} for held in (standing.config, config))
    differing = [
        f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked for"
        for key in {**there, **asked}
        if there.get(key) != asked.get(key) and key not in _FREE
    ]
    shown = [text if len(text) <= 300 else f"{text[:300]}..." for text in differing]
    if differing:
        raise UserError(
            f"{root} holds a training under another config: {'; '.join(shown)}. Go on with the old settings, or give "
            "another --out"
        )
    if there["workers"] != asked["workers"]:
        say(f"{there['workers']} workers there, {asked['workers']} now: what follows is not the same to the last bit")
        return config
    return {**config, "torch_threads": there["torch_threads"]}
