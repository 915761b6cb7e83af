"""The localizer's side of the training loop: labels, validation, and the files of the result."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from saltern.pipeline.localizer.labels import targets
from saltern.pipeline.localizer.step import LocalizerTraining, Log
from saltern.pipeline.localizer.validation import Validation
from saltern.pipeline.machine import decode_threads
from saltern.pipeline.masknet.localizer import save_localizer
from saltern.pipeline.methods.localizer import LocalizerMap
from saltern.pipeline.models import classifiers
from saltern.pipeline.models.probe import probe
from saltern.pipeline.shards.resample import send
from saltern.pipeline.training.batches import Batch
from saltern.pipeline.training.loop import Normalise, preprocess_of
from saltern.pipeline.training.ranks import Ranks
from saltern.pipeline.training.trainee import Say, Trainee
from saltern.schemas.errors import UserError

if TYPE_CHECKING:
    from saltern.pipeline.localizer.plan import LocalizerPlan


class LocalizerTrainee(Trainee):
    """A `LocalizerTraining` that the loop drives. Raises UserError if the weights here differ from the plan's."""

    remedy = "lower rates (--lr, --lr-trunk)"

    def __init__(self, plan: "LocalizerPlan", ranks: Ranks, say: Say) -> None:
        self._plan, self._ranks, self._say = plan, ranks, say
        config = plan.config
        classifier = classifiers.load(config["model"], plan.weights, seed=config["model_seed"], side=config["side"])
        if classifier.digest != config["weights_digest"]:
            raise UserError(f"the weights {plan.weights} of rank {ranks.rank} differ from those of the driver")
        # Convolutions are faster in channels_last: depthwise ones take half the time on CPUs.
        model = classifier.model.to(ranks.device).to(memory_format=torch.channels_last)
        self.training = LocalizerTraining(
            model, plan.hyperparameters, config["steps"], average=ranks.average, side=config["side"]
        )
        self.device = self.training.device
        self._normalise = Normalise(config, self.device)
        with torch.no_grad():
            self._cells = self.training.localizer(probe(model, config["side"])[:1]).shape[-1]

    @property
    def steps_done(self) -> int:
        return self.training.steps_done

    def begin(self) -> None:
        plan, ranks = self._plan, self._ranks
        self._validation: Validation | None = None
        if plan.val is not None:
            batch_size = max(1, plan.config["batch_size"] // ranks.world)
            threads = plan.threads or decode_threads()
            how = preprocess_of(plan.config)
            classes = plan.config["model_classes"]
            self._validation = Validation(plan.val, plan.root, how, batch_size, threads, ranks, self._say, classes)
            self._validation.cut(self.steps_done)

    def step(self, batch: Batch) -> Log:
        labels, side = self._plan.labels, self._plan.config["side"]
        crop_B4 = batch.crop_B4 * torch.tensor([side, side, 1, 1])
        on_device = (send(part, self.device) for part in (*labels.read(batch.label_B), crop_B4))
        grid_Bhw, box_B4, geometry_B4, crop_B4 = on_device
        wanted = targets(labels.kind, labels.side, grid_Bhw, box_B4, geometry_B4, crop_B4, self._cells)
        return self.training.step(self._normalise(batch.pixels_BHWC), wanted)

    def validate(self) -> Mapping[str, float] | None:
        return None if self._validation is None else self._validation(self.training)

    def finish(self) -> None:
        """Write localizer.safetensors and localizer.json, and say how the localizer and its teacher do."""
        training, localizer = self.training, self.training.localizer
        figures = None
        if self._validation is not None:
            figures = self._validation.figures()
            self._say(self._validation.table(figures))
        tuned = training.hyperparameters.trunk == "tuned"
        parts = {"head": localizer.head.state_dict(), **({"trunk": localizer.model.state_dict()} if tuned else {})}
        rest = {"taps": localizer.names, "rule": LocalizerMap.default_rule, "validation": figures}
        save_localizer(self._plan.root, {**self._plan.config, **rest}, parts)

    def agreement(self) -> tuple[str, object]:
        return "the head", float(
            sum(weight.detach().double().sum() for weight in self.training.localizer.head.parameters())
        )

    def state_dict(self) -> dict[str, Any]:
        return self.training.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state)

    def describe(self, line: Mapping[str, float]) -> str:
        return f"loss {line['loss']:.3f}, mean mask {line['mask_mean']:.2f}, mean label {line['label_mean']:.2f}"
