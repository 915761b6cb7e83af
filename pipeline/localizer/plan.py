"""Turn a request for a localizer into a plan: fill in the defaults, and find every error before the training starts."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any  # noqa: F401

import torch

from saltern.pipeline.extract.request import absolute
from saltern.pipeline.extract.tryout import one_line
from saltern.pipeline.localizer.hyperparameters import Hyperparameters
from saltern.pipeline.localizer.labels import Labels, Targets, make_labels
from saltern.pipeline.localizer.step import LocalizerTraining
from saltern.pipeline.localizer.trainee import LocalizerTrainee
from saltern.pipeline.localizer.validation import held_out
from saltern.pipeline.machine import torch_threads
from saltern.pipeline.masknet.checkpoint import Checkpoint
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.presets import adapt
from saltern.pipeline.models.probe import probe
from saltern.pipeline.runs.reader import SaliencyRun, open_run
from saltern.pipeline.shards.decoder import choose_decoder
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.request import Request, check_request, resumed_config
from saltern.pipeline.training.trainee import Plan, Repeat, Trainee
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import square_of


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Request):
    """The options of a training of a localizer; None: the default."""

    run: str  # folder or URL of the run to learn from
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    shards: Sequence[str] = ()  # where the run's tars are now, if they were moved
    model: str | None = None  # None: the run's, with its weights
    weights: str | None = None  # None: those of the run, or DEFAULT with another model
    val: str | None = None  # a run of the same method over held-out shards with boxes, measured after each epoch
    epochs: int = 10
    batch_size: int = 64
    min_crop: float = 0.5


@dataclass(frozen=True)
class LocalizerPlan(Plan):
    """A checked training of a localizer, as each of its ranks receives it."""

    hyperparameters: Hyperparameters
    labels: Labels
    val: SaliencyRun | None  # the teacher's, to validate on

    def start(self, ranks: Ranks, say: Callable[[str], None]) -> Trainee:
        return LocalizerTrainee(self, ranks, say)

    def recover(self, error: Repeat, setbacks: int) -> str:
        raise error


def make_plan(
    request: TrainRequest, device: str, existing: Checkpoint | None, say: Callable[[str], None]
) -> LocalizerPlan:
    """Check the request and fill in every default.

    Args:
        device: cpu | cuda, of the workers.
        existing: the checkpoint to resume from.
        say: takes a line for the user.

    Raises:
        UserError: the request cannot be met, or differs from the existing training.
    """
    check_request(request)
    run = open_run(request.run, request.shards)
    if len(run.shards) < len(run.run.shards):
        say(f"{request.run} has {len(run.shards):,} of {len(run.run.shards):,} shards; only those are used")
    classifier, model, weights, seed = _classifier(request, run)
    how = _preprocess(request, run, classifier)
    if existing is None:
        _try_step(classifier, request.hyperparameters, square_of(how.crop))
    val = None if request.val is None else held_out(request.val, run)
    root = Path(request.out).absolute()
    try:
        index, labels, digest = make_labels(run, request.hyperparameters.labels, root)
    except OSError as error:
        raise UserError(f"the labels cannot be read from {request.run} or written to {root}: {error}") from error
    steps_per_epoch = request.steps_per_epoch or max(1, len(index) // request.batch_size)
    config = {
        "model": model,
        "weights_digest": classifier.digest,
        "model_classes": classifier.classes,
        "model_seed": seed,
        "settings": asdict(request.hyperparameters),
        "steps": request.epochs * steps_per_epoch,
        "batch_size": request.batch_size,
        "resize": how.resize,  # of whole images, as in extract
        "side": how.crop,
        "squash": how.squash,
        "interpolation": how.interpolation,
        "min_crop": request.min_crop,
        "mean": list(how.mean),
        "std": list(how.std),
        "checkpoint_every": request.checkpoint_every or steps_per_epoch,
        "samples": len(index),
        "teacher": {
            "method": run.config.method,
            "rule": run.config.discretize.text,
            "fingerprint": run.run.fingerprint,
        },
        "labels_digest": digest,
        "device": device,
        "decoder": choose_decoder("auto", device, None if existing is None else existing.config["decoder"]),
        "workers": request.workers,
        "torch_threads": torch_threads(device, request.workers),
    }
    if existing is not None:
        try:
            config = resumed_config(existing, config, root, say)
        except UserError:
            if existing.config.get("labels_digest") != digest:
                labels.path.unlink()  # of another run
            raise
    return LocalizerPlan(
        root,
        absolute(weights),
        index,
        steps_per_epoch,
        request.decode_threads,
        config,
        request.tensorboard,
        request.hyperparameters,
        labels,
        val,
    )


def _classifier(request: TrainRequest, run: SaliencyRun) -> tuple[classifiers.Classifier, str, str, int]:
    """Return the trunk's classifier, and its name, weights and seed. Raises UserError if the run's are not here."""
    config = run.config
    if request.model is None and request.weights is not None:
        raise UserError(f"--weights {request.weights} without --model: the run's model has weights; give both, or none")
    model = request.model or config.model
    weights = request.weights or (config.weights if request.model is None else "DEFAULT")
    seed = config.seed if request.model is None else request.hyperparameters.seed
    classifier = classifiers.load(model, weights, seed=seed, side=request.side or config.preprocess.crop)
    if request.model is None and classifier.digest != config.weights_digest:
        raise UserError(f"the weights {weights} of {model} are not those of {request.run}; give --model and --weights")
    return classifier, model, weights, seed


def _preprocess(request: TrainRequest, run: SaliencyRun, classifier: classifiers.Classifier) -> Preprocess:
    """Return the preprocessing of whole images: that of the run, or of another model's weights."""
    held = run.config.preprocess
    usual = square_of(held.crop)
    side = request.side or usual
    if request.model is not None:
        return adapt(classifier.preset, crop=side, resize=None if held.squash else side, squash=held.squash)
    resize = held.resize * side // usual
    return Preprocess(resize, side, held.squash, held.interpolation, held.mean, held.std)


def _try_step(classifier: classifiers.Classifier, hyperparameters: Hyperparameters, side: int) -> None:
    """Do one step with a copy of the classifier on two random images of the run's size. Raises UserError."""
    copied = copy.deepcopy(classifier.model)
    x_BCHW = probe(copied, side)
    with one_line(copied, x_BCHW):
        training = LocalizerTraining(copied, hyperparameters, 1, side=side)
        grid_Bgg = torch.zeros_like(training.localizer(x_BCHW))
        training.step(x_BCHW, Targets(grid_Bgg, 1 - grid_Bgg))
