"""CASM's side of the training loop: networks, memory, collapses, validation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saltern.pipeline.casm.algorithm.collapse import Watch
from saltern.pipeline.casm.algorithm.log import Log
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.watch import curves
from saltern.pipeline.casm.watch.validation import Validation
from saltern.pipeline.machine import available_memory, decode_threads
from saltern.pipeline.masknet.head import restrict
from saltern.pipeline.masknet.members import Member
from saltern.pipeline.models import classifiers
from saltern.pipeline.runs.agreement import SAMPLES, Agreement
from saltern.pipeline.shards.resample import send
from saltern.pipeline.training.batches import Batch
from saltern.pipeline.training.loop import Normalise, preprocess_of
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.trainee import Say, Trainee
from saltern.schemas.errors import UserError

if TYPE_CHECKING:
    from saltern.pipeline.casm.training.plan import TrainingPlan

_GB = 1e9


class CasmTrainee(Trainee):
    """A `Training` that the loop drives.

    Raises:
        UserError: the weights differ from the plan's, or the pool does not fit in memory.
    """

    remedy = "lower rates (--lr-classifier, --lr-mask)"

    def __init__(self, plan: "TrainingPlan", ranks: Ranks, say: Say) -> None:
        self._plan, self._ranks, self._say = plan, ranks, say
        self.training = build(plan, ranks)
        _check_memory(self.training, ranks.on_machine, say)
        self.device = self.training.device
        self._normalise, self._watch = Normalise(plan.config, self.device), Watch()

    @property
    def steps_done(self) -> int:
        return self.training.steps_done

    @property
    def members(self) -> Sequence[Member]:
        return self.training.pool.members

    def begin(self) -> None:
        self.training.setbacks = self.setbacks
        classes = len(self._plan.config["classes"] or range(self._plan.config["model_classes"]))
        self._labels = Labels(classes, self._plan.config["batch_size"], self.steps_done)
        self._validation = _validation(self._plan, self._ranks, self._say) if self._plan.val else None
        if self._validation is not None:
            self._validation.cut(self.steps_done)

    def step(self, batch: Batch) -> Log:
        return self.training.step(self._normalise(batch.pixels_BHWC), send(batch.label_B, self.device))

    def observe(self, entry: Log) -> None:  # type: ignore[override]  # that of `step`
        self._watch.add(entry.step, entry.area())

    def settle(self) -> bool:
        self._watch.read(self.steps_done - 1)
        return self._watch.healthy

    def validate(self) -> Mapping[str, float] | None:
        return None if self._validation is None else self._validation(self.training)

    def finish(self) -> None:
        curves.draw(self._plan.root)

    def agreement(self) -> tuple[str, object]:
        return "the pool", self.training.pool.digest()

    def state_dict(self) -> dict[str, Any]:
        return self.training.state_dict(pool=False)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state)
        self.setbacks = self.training.setbacks

    def describe(self, line: Mapping[str, float]) -> str:
        return (
            f"mask loss {line['mask_loss']:.3f}, mean mask {line['mask_mean']:.2f}, lambda {line['lambda']:.3g}, "
            f"right {line['right']:.2f}"
        )

    def warn(self, line: Mapping[str, float]) -> str | None:
        return self._labels.warn(line["right"])


class Labels:
    """Notices that the classifier is right about the first samples no more often than by chance.

    Args:
        classes: in play.
        batch_size: images of a step, of all ranks.
        start: step at which the training begins; one that is resumed was compared before.
    """

    def __init__(self, classes: int, batch_size: int, start: int) -> None:
        self._classes, self._batch_size = classes, batch_size
        self._compared = 0 if start == 0 else SAMPLES  # samples whose label was compared
        self._right = 0.0  # of them

    def warn(self, right: float) -> str | None:
        """Return a warning, once. `right` is the share of a step's images whose class the classifier predicts."""
        if self._compared >= SAMPLES:
            return None
        self._compared += self._batch_size
        self._right += right * self._batch_size
        agreement = Agreement(self._compared, round(self._right), self._classes, True)
        if self._compared < SAMPLES or not agreement.doubtful:
            return None
        return f"WARNING: {agreement.text}, or the model is not trained; see --labels"


def _validation(plan: "TrainingPlan", ranks: Ranks, say: Say) -> Validation:
    config = plan.config
    return Validation(
        plan.val, plan.root, preprocess_of(config), config["classes"] or range(config["model_classes"]),
        max(1, config["batch_size"] // ranks.world), plan.threads or decode_threads(),
        ranks.rank, ranks.world, ranks.average, say, plan.val_labels,
    )  # fmt: skip


def build(plan: "TrainingPlan", ranks: Ranks) -> Training:
    """Return the state of a training at its start. Raises UserError if the weights differ from the plan's."""
    config, hyperparameters = plan.config, plan.hyperparameters
    classifier = classifiers.load(config["model"], plan.weights, seed=hyperparameters.seed, side=config["side"])
    if classifier.digest != config["weights_digest"]:
        raise UserError(f"the weights {plan.weights} of rank {ranks.rank} differ from those of the driver")
    model = classifier.model
    if config["classes"] is not None:
        restrict(model, config["classes"], config["side"])
    # Statistics over the whole batch, as one device computes them. torch has SyncBatchNorm only for CUDA.
    synchronised = ranks.world > 1 and ranks.device.type == "cuda" and hyperparameters.batch_norm == "train"
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    # Convolutions are faster in channels_last: depthwise ones take half the time on CPUs.
    model = model.to(ranks.device).to(memory_format=torch.channels_last)
    training = Training(model, hyperparameters, rank=ranks.rank, average=ranks.average, side=config["side"])
    if synchronised:
        # In place: the modules are replaced, their weights are kept.
        nn.SyncBatchNorm.convert_sync_batchnorm(training.decoder)  # type: ignore[no-untyped-call]
    return training


def _check_memory(training: Training, ranks_here: int, say: Say) -> None:
    """Say how much memory the full pools of this machine's ranks take. Raises UserError if it does not fit."""
    hyperparameters = training.hyperparameters
    members = min(hyperparameters.pool_size, hyperparameters.thinning.taken(hyperparameters.steps or 0))
    if not members:
        return
    one = ranks_here * training.pool.needs(training.classifier) // hyperparameters.pool_size
    free = available_memory()
    stated = f"the pool takes up to {members * one / _GB:,.2f} GB of memory ({members} classifiers" + (
        f", in each of {ranks_here} workers here)" if ranks_here > 1 else ")"
    )
    say(stated if free is None else f"{stated}; {free / _GB:,.1f} GB are free")
    if free is not None and members * one > free:
        raise UserError(
            f"{stated}, and {free / _GB:,.2f} GB are free; lower --pool-size (to {free // one} at most), or keep "
            "weights in 16 bits: --pool-half"
        )
