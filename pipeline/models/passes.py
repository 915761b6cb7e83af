"""The score that a map explains, and its gradient.

Shape suffixes: B batch, K classes, N classes that a class is compared with, C a layer's channels.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.models.outputs import find_logits, no_logits
from saltern.schemas.errors import UserError


@dataclass(frozen=True)
class Score:
    """What the maps of a batch explain: the logit of a class, or what it has more than those of similar classes.

    s = z_c - alpha * mean of the logits of the others, a linear combination of the logits.
    """

    class_B: Tensor  # int64, the class c of each sample
    others_BN: Tensor | None = None  # int64, the classes that it is compared with; None = none
    alpha: float = 0.0

    def of(self, logits_BK: Tensor) -> Tensor:
        """Return score_B, float32 at least, because scores are subtracted from each other."""
        wide = torch.promote_types(logits_BK.dtype, torch.float32)
        own_B = logits_BK.gather(1, self.class_B[:, None])[:, 0].to(wide)
        if self.others_BN is None:
            return own_B
        return own_B - self.alpha * logits_BK.gather(1, self.others_BN).to(wide).mean(1)

    def combined(self, weight_KC: Tensor) -> Tensor:
        """Return the same combination of the rows of a head's weights, weight_BC."""
        own_BC = weight_KC[self.class_B]
        return own_BC if self.others_BN is None else own_BC - self.alpha * weight_KC[self.others_BN].mean(1)

    def weights(self, logits_BK: Tensor) -> Tensor:
        """Return weight_BK, the derivative of the score by the logits."""
        weight_BK = torch.zeros_like(logits_BK)
        if self.others_BN is not None:
            weight_BK = weight_BK.scatter(1, self.others_BN, -self.alpha / self.others_BN.shape[1])
        return weight_BK.scatter(1, self.class_B[:, None], 1)

    def repeat(self, times: int) -> "Score":
        """Return the scores of the whole batch several times."""
        return self._mapped(lambda index: index.repeat(times, *(1,) * (index.ndim - 1)))

    def repeat_each(self, times: int) -> "Score":
        """Return the scores of each sample several times in a row."""
        return self._mapped(lambda index: index.repeat_interleave(times, 0))

    def part(self, which: slice) -> "Score":
        """Return the scores of some samples."""
        return self._mapped(lambda index: index[which])

    @staticmethod
    def joined(parts: Sequence["Score"]) -> "Score":
        """Return the scores of all samples of the parts."""
        others = [part.others_BN for part in parts if part.others_BN is not None]
        return Score(torch.cat([part.class_B for part in parts]), torch.cat(others) if others else None, parts[0].alpha)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Score":
        others_BN = None if self.others_BN is None else change(self.others_BN)
        return replace(self, class_B=change(self.class_B), others_BN=others_BN)


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast, so that sums and weights stay in float32."""
    return torch.autocast(device.type, enabled=False)


def logits_of(output: Any) -> Tensor:
    """Return logits_BK from what a model returns, in any form of `find_logits`. Raises UserError if there are none."""
    logits_BK = find_logits(output)
    if logits_BK is not None:
        return logits_BK
    raise no_logits("the model", output)


def pick_target(logits_BK: Tensor, target_B: Tensor | None) -> Tensor:
    """Return the class to explain for each sample, int64 (B): the given one, or top-1.

    Raises UserError on a class out of range. Only checked on the CPU, because the check would stall an accelerator.
    """
    if target_B is None:
        return logits_BK.argmax(1)
    classes = logits_BK.shape[1]
    if target_B.device.type == "cpu" and bool(((target_B < 0) | (target_B >= classes)).any()):
        raise UserError(f"a target is out of range: the model has classes 0..{classes - 1}")
    return target_B


def pick_targets(logits_BK: Tensor, target_B: Tensor | None, number: int) -> list[Tensor]:
    """Return each sample's given class as `pick_target` does, or its `number` most probable classes."""
    first_B = pick_target(logits_BK, target_B)
    return [first_B] if number == 1 else [first_B, *logits_BK.detach().topk(number, 1).indices.unbind(1)[1:]]


def gradients_of_each(
    logits_BK: Tensor, scores: Sequence[Score], inputs: Sequence[Tensor]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the gradients of `score_gradients` for each of the scores, by as many backward passes of one graph."""
    for left, score in zip(reversed(range(len(scores))), scores, strict=True):
        yield score_gradients(logits_BK, score, inputs, keep=left > 0)


def score_gradients(
    logits_BK: Tensor, score: Score, inputs: Sequence[Tensor], *, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """Return ds / d input of each sample's own score; None for an input that the logits do not depend on.

    Args:
        keep: the graph, for another backward pass.
    """
    if not logits_BK.requires_grad:
        return (None,) * len(inputs)
    # In eval mode samples do not mix. The score's derivative is given: on a GPU, the backward pass of `gather` that
    # repeats to the bit takes two dozen kernels.
    weight_BK = score.weights(logits_BK.detach())
    with full_precision(logits_BK.device):
        return torch.autograd.grad(logits_BK, inputs, weight_BK, allow_unused=True, retain_graph=keep)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep the model in eval mode and its parameters without gradients; restore all flags on exit."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
