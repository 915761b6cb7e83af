"""Turn a request into a plan: fill in the defaults, and find every error before the training starts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.extract.labels import AUTO, Numbers, choose_labels
from saltern.pipeline.extract.request import absolute
from saltern.pipeline.extract.tryout import one_line
from saltern.pipeline.machine import torch_threads
from saltern.pipeline.masknet.checkpoint import Checkpoint
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.masknet.stages import find_stages
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.presets import Preset, adapt
from saltern.pipeline.models.probe import probe
from saltern.pipeline.naming import install_hint
from saltern.pipeline.shards.decoder import choose_decoder
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.training.batches import MIN_CROP
from saltern.pipeline.training.index import Index, make_index
from saltern.schemas.config import PILLOW, Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.run import Shard

SHARE = 5  # an epoch is a fifth of the data, as published
_WIDE = 150  # characters of a value in an error
_FREE = ("workers", "torch_threads")  # may differ in a resumed training; only the last bits of its results then do


@dataclass(frozen=True)
class TrainRequest:
    """The options of a training; None: the default."""

    shards: Sequence[str]
    out: str
    model: str
    hyperparameters: Hyperparameters  # `steps` is replaced: it follows from the epochs
    weights: str = "DEFAULT"
    classes: Sequence[int] | None = None  # to train on; None: all
    labels: str = AUTO  # auto | as-is | a JSON file from the dataset's classes to the model's
    val: Sequence[str] = ()  # shards with boxes, measured after each epoch
    epochs: int = 60
    steps_per_epoch: int | None = None
    batch_size: int = 128  # of all workers together
    side: int | None = None  # of the network's input, pixels
    min_crop: float = MIN_CROP  # least share of the image that a random crop covers
    checkpoint_every: int | None = None  # steps; None: an epoch
    decode_threads: int | None = None  # of a worker
    device: str = "auto"
    workers: int = 1
    gpus_per_worker: float | None = None
    address: str | None = None  # of a Ray cluster; None: $RAY_ADDRESS, or no cluster
    resume: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """A checked training, as each of its ranks receives it."""

    root: Path
    weights: str
    hyperparameters: Hyperparameters
    index: Index
    val: Sequence[Shard]
    steps_per_epoch: int
    threads: int | None  # that decode in each worker; None: as its machine has cores
    config: dict[str, Any]  # of the checkpoints
    val_labels: Numbers  # of `val`
    tensorboard: bool = False


def make_plan(
    request: TrainRequest, device: str, existing: Checkpoint | None, say: Callable[[str], None]
) -> TrainingPlan:
    """Check the request and fill in every default.

    Args:
        device: cpu | cuda, of the workers.
        existing: the checkpoint to resume from.
        say: takes a line for the user.

    Raises:
        UserError: the request cannot be met, or differs from the existing training.
    """
    _check(request)
    shards, hints = expand(request.shards)
    val, val_hints = expand(request.val) if request.val else ([], [])
    for hint in (*hints, *val_hints):
        say(hint)
    classifier = classifiers.load(request.model, request.weights, seed=request.hyperparameters.seed, side=request.side)
    how = preprocessing(classifier.preset, request.side)
    if request.classes is not None:
        restrict(classifier.model, request.classes, how.crop)
    find_stages(classifier.model, how.crop)
    labels, val_labels = (_labels(request, files, classifier, existing, say) for files in (shards, val))
    index = make_index(shards, classifier.classes, request.classes, labels)
    steps_per_epoch = request.steps_per_epoch or -(-len(index) // (SHARE * request.batch_size))
    hyperparameters = replace(request.hyperparameters, steps=request.epochs * steps_per_epoch)
    config = {
        **_config(request, classifier, how, hyperparameters),
        "checkpoint_every": request.checkpoint_every or steps_per_epoch,
        "samples": len(index),
        "shards": [[shard.name, shard.size] for shard in shards],
        "device": device,
        "decoder": choose_decoder("auto", device, None if existing is None else existing.config.get("decoder", PILLOW)),
        "workers": request.workers,
        "torch_threads": torch_threads(device, request.workers),
        "labels": None if labels is None else {str(given): labels[given] for given in sorted(labels)},
    }
    root = Path(request.out).absolute()
    if existing is None:
        _try_step(classifier, hyperparameters, how.crop)
    else:
        config = _resumed_config(existing, config, root, say)
    return TrainingPlan(
        root,
        absolute(request.weights),
        hyperparameters,
        index,
        val,
        steps_per_epoch,
        request.decode_threads,
        config,
        val_labels,
        request.tensorboard,
    )


def _labels(
    request: TrainRequest,
    shards: Sequence[Shard],
    classifier: classifiers.Classifier,
    existing: Checkpoint | None,
    say: Callable[[str], None],
) -> Numbers:
    """Return the model's class for each number in `cls`. Trainings of older versions had none."""
    older = existing is not None and "labels" not in existing.config
    if not shards or (older and request.labels == AUTO):
        return None
    numbers, hints = choose_labels(request.labels, shards, classifier.class_names, classifier.classes, needed=True)
    for hint in hints:
        say(hint)
    return numbers


def _check(request: TrainRequest) -> None:
    for name in ("epochs", "steps_per_epoch", "batch_size", "side", "checkpoint_every", "decode_threads", "workers"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if request.batch_size % request.workers:
        raise UserError(
            f"--batch-size {request.batch_size} is of all workers, and {request.workers} cannot share it equally"
        )
    if request.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(f"--tensorboard needs the package tensorboard: {install_hint('tensorboard')}") from error
    if not 0 < request.min_crop <= 1:
        raise UserError(f"--min-crop {request.min_crop}: it is a share of the image, more than 0 and at most 1")


def _try_step(classifier: classifiers.Classifier, hyperparameters: Hyperparameters, side: int) -> None:
    """Do one step with a copy of the classifier on two random images of the run's size. Raises UserError."""
    copied = copy.deepcopy(classifier.model)
    x_BCHW = probe(copied, side)
    with one_line(copied, x_BCHW):
        first = replace(hyperparameters, pool_size=1, precision="fp32", share_encoder=True)
        Training(copied, first, side=side).step(x_BCHW, torch.zeros(len(x_BCHW), dtype=torch.long))


def preprocessing(preset: Preset, side: int | None) -> Preprocess:
    """Return the preprocessing of validation images; with a side, the whole shorter side of each is used."""
    squash = preset.preprocess.squash and not preset.unusual
    return adapt(preset, crop=side, resize=None if squash else side)


def preprocess_of(config: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing in the config of a checkpoint; those of 0.1 have no squash."""
    return Preprocess(
        resize=config["resize"],
        crop=config["side"],
        squash=config.get("squash", False),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _config(
    request: TrainRequest, classifier: classifiers.Classifier, how: Preprocess, hyperparameters: Hyperparameters
) -> dict[str, Any]:
    """Return the config, as JSON: a resumed training must repeat it, and users of the masks can read it."""
    return {
        "model": request.model,
        "weights_digest": classifier.digest,
        "model_classes": classifier.classes,
        "classes": None if request.classes is None else list(request.classes),
        "settings": {**asdict(hyperparameters), "thinning": hyperparameters.thinning.name},
        "steps": hyperparameters.steps,
        "batch_size": request.batch_size,
        "resize": how.resize,  # of validation images, as in extract
        "side": how.crop,
        "squash": how.squash,  # of validation images
        "interpolation": how.interpolation,
        "min_crop": request.min_crop,
        "mean": list(how.mean),
        "std": list(how.std),
    }


def _resumed_config(
    existing: Checkpoint, config: dict[str, Any], root: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the requested config with the torch threads of the existing training.

    Raises:
        UserError: the two differ in more than `_FREE`.
    """
    held = {"squash": False, "pull": 0.0, "decoder": PILLOW, **existing.config}  # absent from checkpoints of 0.1
    old, new = ({**each, **each["settings"], "settings": None} for each in (held, config))
    if differing := differences(old, new):
        raise UserError(
            f"{root} holds a training under another config: {differing}. Resume with the old options, or give another "
            "--out"
        )
    if old["workers"] != new["workers"]:
        say(f"{old['workers']} workers before, {new['workers']} now: results differ in the last bits from here on")
        return config
    return {**config, "torch_threads": old["torch_threads"]}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the keys, except `_FREE`, whose values differ between two configs; "" if none does."""
    return "; ".join(
        f"{key}: {repr(old.get(key))[:_WIDE]} there, {repr(new.get(key))[:_WIDE]} requested"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in _FREE
    )
