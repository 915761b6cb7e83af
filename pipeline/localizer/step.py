"""One step of a localizer's training, in one process or as one of many ranks.

Shape suffixes: B batch, C H W the network's input, K classes, g the mask's grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.localizer.hyperparameters import Hyperparameters, rate
from saltern.pipeline.localizer.labels import Targets
from saltern.pipeline.localizer.losses import cross_entropy, mask_sums, smoothed
from saltern.pipeline.masknet.localizer import Head, Localizer
from saltern.pipeline.masknet.stages import find_stages

Average = Callable[[list[Tensor]], None]  # replaces each tensor by its mean over all ranks, in place
MEASURED = ("loss", "mask_mean", "label_mean")
CLIP = 1.0  # norm of the head's gradient


@dataclass(frozen=True, eq=False)
class Log:
    """The measurements of one step, over all ranks; on the device."""

    step: int
    measured: Tensor  # MEASURED, float64

    def floats(self) -> dict[str, float]:
        """Return a line of the log. Waits for the device.

        loss: cross-entropy of the mask, nats. mask_mean, label_mean: of the masks and of their labels in the crops, in
        [0, 1].
        """
        return {"step": self.step, **dict(zip(MEASURED, self.measured.tolist(), strict=True))}


class LocalizerTraining:
    """The state of a training, which each step on a batch updates: head, trunk if it is tuned, and optimiser.

    BatchNorm of the trunk keeps its running statistics, and dropout is off, so that nothing is random here, and the
    result does not depend on how ranks share a batch.

    Args:
        classifier: on its device. Trained in place if the trunk is tuned.
        steps: of the whole training.
        average: replaces tensors by their means over the ranks. All ranks must have batches of one size.
        side: of the images, pixels.

    Raises:
        UserError: the classifier has no stages.
    """

    def __init__(
        self,
        classifier: nn.Module,
        hyperparameters: Hyperparameters,
        steps: int,
        *,
        average: Average = lambda tensors: None,
        side: int | None = None,
    ) -> None:
        self.hyperparameters, self.steps_done, self._steps, self._average = hyperparameters, 0, steps, average
        self.device = next(classifier.parameters()).device
        stages = find_stages(classifier, side)
        draw = torch.Generator().manual_seed(hyperparameters.seed)
        head = Head(stages.channels[2:], draw).to(self.device)
        tuned = hyperparameters.trunk == "tuned"
        self.localizer = Localizer(classifier.eval(), stages.names[2:], head, detached=not tuned)
        classifier.requires_grad_(tuned)
        groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "rate": hyperparameters.lr}]
        if tuned:
            groups.append({"params": self.localizer.trunk_weights(side), "rate": hyperparameters.lr_trunk})
        self._weights = [weight for group in groups for weight in group["params"]]
        self._optimiser = torch.optim.AdamW(groups, hyperparameters.lr, weight_decay=hyperparameters.weight_decay)

    def step(self, x_BCHW: Tensor, wanted: Targets) -> Log:
        """Do one step on normalised crops and their labels."""
        factor = rate(self.steps_done, self._steps)
        for group in self._optimiser.param_groups:
            group["lr"] = group["rate"] * factor
        sums_2gg = mask_sums(wanted)
        self._average([sums_2gg])
        with torch.enable_grad():
            with self._autocast():
                logits_Bgg = self.localizer(x_BCHW)
            loss = cross_entropy(logits_Bgg, smoothed(wanted, sums_2gg, self.hyperparameters.smoothing))
            for weight in self._weights:
                weight.grad = None
            torch.autograd.backward(loss, inputs=self._weights)
        self._average([weight.grad for weight in self._weights if weight.grad is not None])
        nn.utils.clip_grad_norm_(self._weights, CLIP)
        self._optimiser.step()
        means = loss, logits_Bgg.sigmoid().mean(), wanted.mask_Bgg.mean()
        measured = torch.stack([value.detach().double() for value in means])
        self._average([measured])
        log = Log(self.steps_done, measured)
        self.steps_done += 1
        return log

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step depends on; live tensors, as in torch."""
        tuned = self.hyperparameters.trunk == "tuned"
        return {
            "steps_done": self.steps_done,
            "pool_manifest": [],
            "head": self.localizer.head.state_dict(),
            **({"trunk": self.localizer.model.state_dict()} if tuned else {}),
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.localizer.head.load_state_dict(state["head"])
        if "trunk" in state:
            self.localizer.model.load_state_dict(state["trunk"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.steps_done = state["steps_done"]

    def _autocast(self) -> torch.autocast:
        enabled = self.hyperparameters.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
