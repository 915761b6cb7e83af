"""A saliency method of your own: the norm of the activations in each cell, without a class.

saltern extract SHARDS --out RUN --model resnet50 --method own_method:ActivationNorm -O order=1

Start the command in this folder, or put the folder on PYTHONPATH.
"""

from typing import Annotated

import torch
from torch import Tensor

from saltern.pipeline.methods import Method
from saltern.pipeline.models.taps import Taps


class ActivationNorm(Method):
    """Norm of a layer's activations over the channels, in each cell."""

    cost = "1 forward"
    needs_target = False  # the same map for every class
    layered = True  # takes --layer; the default is the last stage
    order: Annotated[float, "Order of the norm, for example 1 or 2."] = 2.0

    def prepare(self) -> None:
        self._taps = Taps(self.model, self.layer)

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Tensor, Tensor, None]:
        logits_BK, (output,) = self._taps.forward(x_BCHW)
        A_BKhw = self._taps.grid(0, output, x_BCHW.shape[2:])
        return torch.linalg.vector_norm(A_BKhw, self.order, dim=1), logits_BK, None
