"""Gradients averaged over points near the image or on a path to it: SmoothGrad, integrated gradients.

Shape suffixes: B batch, S points of an image, C H W the network's input, K classes, N elements of an image.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from saltern.pipeline.methods.base import Each
from saltern.pipeline.methods.gradients.gradient import Gradient, Reduce, Value, pixel_gradients
from saltern.pipeline.methods.gradients.noise import gaussian
from saltern.pipeline.models.passes import Score, full_precision
from saltern.schemas.errors import UserError


class Averaged(Gradient):
    """Base of the weighted means of gradients at several points for each image. A subclass implements `points`.

    All points of an image share its target. `chunk` bounds the memory for any number of points.
    """

    chunk: Annotated[int, "Images in one pass."] = 64

    _count: int  # points of an image

    def points(self, x_BCHW: Tensor, which: range) -> tuple[Tensor, Tensor | float]:
        """Return points_SBCHW in the dtype of x, and their weights: weight_S, float32, or one number for all."""
        raise NotImplementedError

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        with torch.no_grad():
            logits_BK = self.forward(x_BCHW)
        scores = self.scores(logits_BK, target_B, number)
        means = [torch.zeros_like(x_BCHW, dtype=torch.float32) for _ in scores]
        for which in groups(self._count, self.chunk, len(x_BCHW)):
            for mean_BCHW, part_BCHW in zip(means, self._parts(x_BCHW, scores, which), strict=True):
                mean_BCHW += part_BCHW
        return [self.reduced(self.weighed(mean_BCHW, x_BCHW)) for mean_BCHW in means], logits_BK, scores

    def _parts(self, x_BCHW: Tensor, scores: Sequence[Score], which: range) -> Iterator[Tensor]:
        """Yield the share of some points in the mean gradient of each score."""
        with torch.no_grad(), full_precision(x_BCHW.device):
            points_SBCHW, weight_S = self.points(x_BCHW, which)
            layout = torch.contiguous_format if x_BCHW.is_contiguous() else torch.channels_last
            flat = points_SBCHW.flatten(0, 1).contiguous(memory_format=layout)
        flat.requires_grad_()
        repeated = [score.repeat(len(which)) for score in scores]
        weight = weight_S if isinstance(weight_S, float) else weight_S.view(-1, 1, 1, 1, 1)
        for gradient in pixel_gradients(self.forward(flat), repeated, flat):
            yield (gradient.float().view(points_SBCHW.shape) * weight).sum(0)


class SmoothGrad(Averaged):
    """Mean gradient over noisy copies of the image; its largest magnitude over the channels (Smilkov 2017).

    The noise depends only on each sample's seed (`seed_B` of the call).
    """

    name = "smoothgrad"
    cost = "1 forward, then 1 forward and backward for each of `samples`"

    samples: Annotated[int, "Noisy copies of an image."] = 32
    noise: Annotated[float, "Standard deviation over the image's range (largest minus smallest value)."] = 0.15

    def prepare(self) -> None:
        _check(self, samples=self.samples, chunk=self.chunk)
        if self.noise < 0:
            raise UserError(f"option noise of {self.title()} must be 0 or more, not {self.noise}")
        self._count = self.samples

    def points(self, x_BCHW: Tensor, which: range) -> tuple[Tensor, Tensor | float]:
        flat_BN = x_BCHW.flatten(1)
        sigma_B1 = self.noise * (flat_BN.amax(1, keepdim=True) - flat_BN.amin(1, keepdim=True)).float()
        noise_SBN = gaussian(self.seed_B, which, flat_BN.shape[1])
        points_SBN = noise_SBN.mul_(sigma_B1).add_(flat_BN).to(x_BCHW.dtype)
        return points_SBN.view(-1, *x_BCHW.shape), 1 / self.samples


class IntegratedGradients(Averaged):
    """Image minus baseline, times the mean gradient on the straight path between them (Sundararajan 2017).

    Signed and summed over the channels, the map adds up to z_c(x) - z_c(baseline), up to the error of the quadrature
    (Gauss-Legendre).
    """

    name = "integrated-gradients"
    cost = "1 forward, then 1 forward and backward for each of `steps`"
    default_map_dtype = "float16"  # signed: a uint8 scale would have to span both tails

    steps: Annotated[int, "Points on the path."] = 32
    baseline: Annotated[float, "Value of all pixels of the baseline, normalised; 0 is the mean colour."] = 0.0
    reduce: Reduce = "sum"
    value: Value = "signed"

    def prepare(self) -> None:
        _check(self, steps=self.steps, chunk=self.chunk)
        self._count = self.steps
        node_S, weight_S = np.polynomial.legendre.leggauss(self.steps)  # on [-1, 1]
        weight = next(self.model.parameters(), torch.empty(0))
        self._position_S = torch.tensor((node_S + 1) / 2, dtype=torch.float32, device=weight.device)
        self._weight_S = torch.tensor(weight_S / 2, dtype=torch.float32, device=weight.device)

    def points(self, x_BCHW: Tensor, which: range) -> tuple[Tensor, Tensor | float]:
        part = slice(which.start, which.stop)
        position_S = self._position_S[part].view(-1, 1, 1, 1, 1)
        points_SBCHW = (x_BCHW - self.baseline) * position_S + self.baseline
        return points_SBCHW.to(x_BCHW.dtype), self._weight_S[part]

    def weighed(self, gradient_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        return gradient_BCHW * (x_BCHW - self.baseline)


def groups(count: int, chunk: int, batch: int) -> list[range]:
    """Split 0..count into runs whose length times the batch is about `chunk`."""
    size = max(1, chunk // batch)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _check(method: Gradient, **options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UserError(f"option {name} of {method.title()} must be 1 or more, not {value}")
