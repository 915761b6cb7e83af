"""Turn a request into a plan: fill in the defaults, and find every error before the training starts."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saltern.pipeline.casm.algorithm.collapse import DEAD, SETBACKS, SLOWER, Collapse
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.training.trainee import CasmTrainee
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
from saltern.pipeline.shards.decoder import choose_decoder
from saltern.pipeline.shards.expand import expand
from saltern.pipeline.training.batches import MIN_CROP
from saltern.pipeline.training.index import make_index
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.request import Request, check_request, resumed_config
from saltern.pipeline.training.trainee import Plan, Repeat, Trainee
from saltern.schemas.config import PILLOW, Preprocess
from saltern.schemas.errors import CollapseError
from saltern.schemas.run import Shard
from saltern.schemas.sizes import square_of

SHARE = 5  # an epoch is a fifth of the data, as published


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Request):
    """The options of a training of CASM; None: the default."""

    shards: Sequence[str]
    model: str
    hyperparameters: Hyperparameters  # `steps` is replaced: it follows from the epochs
    weights: str = "DEFAULT"
    classes: Sequence[int] | None = None  # to train on; None: all
    labels: str = AUTO  # auto | as-is | a JSON file from the dataset's classes to the model's
    val: Sequence[str] = ()  # shards with boxes, measured after each epoch
    epochs: int = 60
    batch_size: int = 128
    min_crop: float = MIN_CROP


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """A checked training of CASM, as each of its ranks receives it."""

    hyperparameters: Hyperparameters
    val: Sequence[Shard]
    val_labels: Numbers  # of `val`

    def start(self, ranks: Ranks, say: Callable[[str], None]) -> Trainee:
        return CasmTrainee(self, ranks, say)

    def recover(self, error: Repeat, setbacks: int) -> str:
        if not isinstance(error, Collapse):
            raise error
        return _describe_setback(error, self.hyperparameters, setbacks)


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
    check_request(request)
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
        _try_step(classifier, hyperparameters, square_of(how.crop))
    else:
        of_0_1 = {"squash": False, "pull": 0.0, "decoder": PILLOW}
        config = resumed_config(existing, config, root, say, **of_0_1)
    return TrainingPlan(
        root,
        absolute(request.weights),
        index,
        steps_per_epoch,
        request.decode_threads,
        config,
        request.tensorboard,
        hyperparameters,
        val,
        val_labels,
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


def _describe_setback(collapse: Collapse, hyperparameters: Hyperparameters, setbacks: int) -> str:
    """Describe a collapse from which the training recovers. Raises CollapseError if there were too many before it."""
    found = f"masks collapsed: they have taken out {collapse.what} for {DEAD} steps, up to step {collapse.step:,}"
    if setbacks <= SETBACKS:
        factor = SLOWER**setbacks
        return f"warning: {found}; back to the last healthy checkpoint, with {factor:g} x --lr-mask"
    fix = f"lower --lr-mask ({hyperparameters.lr_mask:g}) or --tv ({hyperparameters.tv:g}), or raise --batch-size"
    if hyperparameters.lam != "auto":
        way = "lower" if collapse.what == "nothing" else "raise"
        fix = f"{way} --lambda ({hyperparameters.start_lambda():g}), or use --lambda auto with --preset steady"
    raise CollapseError(
        f"{found}, again after {SETBACKS} repetitions with a smaller step; {fix}, and give another --out"
    )
