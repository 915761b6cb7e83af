"""From a model's output to the score that a map explains, and to its gradient.

Shape suffixes: B batch, K classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saltern.schemas.errors import UserError


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast: sums and weights stay in float32 whatever the forward ran in."""
    return torch.autocast(device.type, enabled=False)


def logits_of(output: Any) -> Tensor:
    """The model's output as logits_BK. Raises UserError where it is none."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UserError(
        f"the model must return logits of shape (batch, classes), not {got}; wrap it in a factory that does"
    )


def pick_target(logits_BK: Tensor, target_B: Tensor | None) -> Tensor:
    """The class explained for each sample, int64 (B): as given, else top-1.

    Raises UserError on a class out of range; on the CPU only, as the check would stall an accelerator.
    """
    if target_B is None:
        return logits_BK.argmax(1)
    classes = logits_BK.shape[1]
    if target_B.device.type == "cpu" and bool(((target_B < 0) | (target_B >= classes)).any()):
        raise UserError(f"a target is out of range: the model has classes 0..{classes - 1}")
    return target_B


def score_gradients(logits_BK: Tensor, target_B: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """dz_c / d input, each sample's target its own; None for an input that the logits do not depend on."""
    if not logits_BK.requires_grad:
        return (None,) * len(inputs)
    # In eval mode samples do not mix, so the gradient of the sum holds each sample's own.
    score = logits_BK.float().gather(1, target_B[:, None]).sum()
    with full_precision(logits_BK.device):
        return torch.autograd.grad(score, inputs, allow_unused=True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its parameters without gradients; all flags as before on the way out."""
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
