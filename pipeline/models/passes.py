"""The score that a map explains, and its gradient.

Shape suffixes: B batch, K classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saltern.schemas.errors import UserError


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast, so that sums and weights stay in float32."""
    return torch.autocast(device.type, enabled=False)


def logits_of(output: Any) -> Tensor:
    """Return the model's output as logits_BK. Raises UserError if it has another form."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    form = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UserError(
        f"the model must return logits of shape (batch, classes), not {form}; wrap it in a factory that does"
    )


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
    logits_BK: Tensor, targets: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the gradients of `score_gradients` for each of the targets, by as many backward passes of one graph."""
    for left, target_B in zip(reversed(range(len(targets))), targets, strict=True):
        yield score_gradients(logits_BK, target_B, inputs, keep=left > 0)


def score_gradients(
    logits_BK: Tensor, target_B: Tensor, inputs: Sequence[Tensor], *, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """Return dz_c / d input, with each sample's own target c; None for an input that the logits do not depend on.

    Args:
        keep: the graph, for another backward pass.
    """
    if not logits_BK.requires_grad:
        return (None,) * len(inputs)
    # In eval mode samples do not mix, so the gradient of the sum holds that of each sample.
    score = logits_BK.float().gather(1, target_B[:, None]).sum()
    with full_precision(logits_BK.device):
        return torch.autograd.grad(score, inputs, allow_unused=True, retain_graph=keep)


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
