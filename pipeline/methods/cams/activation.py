"""The CAM family: channels of a target layer, weighted and summed.

Shape suffixes: B batch, C H W the network's input, K channels, h w the layer's grid.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from saltern.pipeline.methods.base import Maps, safe_divide, weighted_sum
from saltern.pipeline.methods.cams.one_pass import OnePass
from saltern.pipeline.models.compiling import large_parts, parts_up_to
from saltern.pipeline.models.halves import full_of
from saltern.pipeline.models.passes import Score, frozen, full_precision
from saltern.pipeline.models.probe import probe
from saltern.schemas.errors import UserError


class GradientCAM(OnePass):
    """Base of the CAMs of an activation A and its gradient G = dz_c/dA. A subclass implements `combine`."""

    cost = "1 forward, and the backward down to the layer"
    many_layers = True

    def trunk(self) -> Sequence[nn.Module]:
        with frozen(self.model):
            return parts_up_to(self.model, self.taps.modules, probe(self.model, self.input_side)[:1])

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        """Return map_Bhw from the float32 activations and gradients of one layer."""
        raise NotImplementedError

    def maps_of(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], score: Score, image: Sequence[int]
    ) -> Maps:
        return tuple(
            self.combine(self.taps.grid(index, output, image), self.taps.grid(index, gradient, image))
            for index, (output, gradient) in enumerate(zip(outputs, gradients, strict=True))
        )


class GradCAM(GradientCAM):
    """ReLU of the activations weighted by the mean gradient of the logit (Selvaraju 2017, eq. 1-2)."""

    name = "grad-cam"

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        return weighted_sum(G_BKhw.mean((2, 3)), A_BKhw).relu()


class GradCAMPlusPlus(GradientCAM):
    """Grad-CAM of the positive gradients, each weighted by its alpha (Chattopadhay 2018, eq. 10 and 19).

    `eps` changes the map visibly, because gradients are about 1e-3; 1e-6 is that of pytorch-grad-cam.
    """

    name = "grad-cam++"

    eps: Annotated[float, "Added to the denominators of the alphas."] = 1e-6

    def prepare(self) -> None:
        super().prepare()
        if not 0 <= self.eps < math.inf:
            raise UserError(f"eps={self.eps} of {self.title()} must be 0 or more, and finite")

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        square_BKhw = G_BKhw.square()
        # G^3 is factored: S * G comes first, so that the third power does not underflow.
        denominator_BKhw = square_BKhw * (2 + A_BKhw.sum((2, 3), keepdim=True) * G_BKhw) + self.eps
        weight_BK = (G_BKhw.relu() * safe_divide(square_BKhw, denominator_BKhw)).sum((2, 3))
        return weighted_sum(weight_BK, A_BKhw).relu()


class LayerCAM(GradientCAM):
    """ReLU of the activations, each weighted by its own positive gradient (Jiang 2021, eq. 4-6)."""

    name = "layer-cam"

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        return (G_BKhw.relu() * A_BKhw).sum(1).relu()


class HiResCAM(GradientCAM):
    """ReLU of the activations, each weighted by its own signed gradient (Draelos 2020, section 3.3)."""

    name = "hires-cam"

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        return (G_BKhw * A_BKhw).sum(1).relu()


class XGradCAM(GradientCAM):
    """ReLU of the activations weighted by the activation-weighted mean gradient (Fu 2020, eq. 8).

    A channel whose activations sum to 0 has weight 0. If activations are signed, that sum can come near 0 and the
    weight grows without bound: take a layer after a ReLU.
    """

    name = "xgrad-cam"

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        weight_BK = safe_divide((G_BKhw * A_BKhw).sum((2, 3)), A_BKhw.sum((2, 3)))
        return weighted_sum(weight_BK, A_BKhw).relu()


class EigenCAM(OnePass):
    """Cells projected on the first principal component of a layer's channels; no class (Muhammad 2020, section III).

    The channels are first centred over the cells. The map is therefore signed and sums to 0; it has no ReLU. The sign
    of the component is chosen so that the map correlates with the mean of the channels. If the channels sum to about
    0 in every cell (after a LayerNorm), the largest magnitude is made positive instead. If the first two components
    are equally strong, the map is an arbitrary mixture of them.
    """

    name = "eigen-cam"
    cost = "1 forward, and an eigendecomposition"
    needs_target = False
    many_layers = True
    differentiates = False

    def trunk(self) -> Sequence[nn.Module]:
        return large_parts(self.model, self.taps.modules)

    def maps_of(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], score: Score, image: Sequence[int]
    ) -> Maps:
        return tuple(first_component(self.taps.grid(index, output, image)) for index, output in enumerate(outputs))


class CAM(OnePass):
    """Activations weighted by the linear head after global average pooling; signed, no gradient (Zhou 2016, eq. 2).

    The ReLU of this map equals h * w times Grad-CAM. A functional ReLU between the layer and the pooling (DenseNet)
    counts as part of the activation. The head's bias is left out.
    """

    name = "cam"
    cost = "1 forward"
    differentiates = False

    def prepare(self) -> None:
        super().prepare()
        heads = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        x_BCHW = probe(self.model, self.input_side)
        with torch.no_grad(), full_precision(x_BCHW.device):
            logits_BK, outputs = self.taps.forward(x_BCHW)
            A_BKhw = self.taps.grid(0, outputs[0], x_BCHW.shape[2:])
            for rectified in (False, True):
                if heads and _explains(heads[-1], A_BKhw.relu() if rectified else A_BKhw, logits_BK.float()):
                    self._head, self._rectified = heads[-1], rectified
                    return
        self._refuse()

    def trunk(self) -> Sequence[nn.Module]:
        return large_parts(self.model, self.taps.modules)

    def _refuse(self) -> None:
        raise UserError(
            f"cam needs a linear head right after global average pooling of its layer, and {type(self.model).__name__} "
            f"with layer {self.layer[0]!r} has none; use grad-cam"
        )

    def maps_of(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], score: Score, image: Sequence[int]
    ) -> Maps:
        A_BKhw = self.taps.grid(0, outputs[0], image)
        weight_BK = score.combined(full_of(self._head.weight)).float()
        return weighted_sum(weight_BK, A_BKhw.relu() if self._rectified else A_BKhw)


def first_component(A_BKhw: Tensor) -> Tensor:
    """Return map_Bhw, cells on their first principal component; NaN if an activation is not finite."""
    X_BNK = A_BKhw.flatten(2).mT.double()
    X_BNK = X_BNK - X_BNK.mean(1, keepdim=True)
    # Take the smaller of the two Gram matrices; its squared singular values need float64.
    few_cells = X_BNK.shape[1] <= X_BNK.shape[2]
    gram_BMM = X_BNK @ X_BNK.mT if few_cells else X_BNK.mT @ X_BNK
    finite_B11 = gram_BMM.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    values_BM, vectors_BMM = torch.linalg.eigh(gram_BMM.where(finite_B11, 0))  # one NaN would fail the whole batch
    if few_cells:
        map_BN = vectors_BMM[..., -1] * values_BM[:, -1:].clamp(min=0).sqrt()
    else:
        map_BN = (X_BNK @ vectors_BMM[..., -1:])[..., 0]
    # Eigenvalue times the cosine between component and channel mean; only rounding if the channels sum to 0.
    along_B1 = (map_BN * X_BNK.mean(2)).sum(1, keepdim=True) * X_BNK.shape[2] ** 0.5
    peak_B1 = map_BN.amax(1, keepdim=True) + map_BN.amin(1, keepdim=True)
    side_B1 = torch.where(along_B1.abs() > 1e-3 * values_BM[:, -1:], along_B1, peak_B1)
    map_BN = torch.where(side_B1 < 0, -map_BN, map_BN)
    return map_BN.where(finite_B11[..., 0], torch.nan).reshape(len(A_BKhw), *A_BKhw.shape[2:]).float()


def _explains(head: nn.Linear, A_BKhw: Tensor, logits_BK: Tensor) -> bool:
    # head(mean(A)) must equal the model's logits; both without the bias, which could hide a difference.
    if A_BKhw.shape[1] != head.in_features or logits_BK.shape[1] != head.out_features:
        return False
    weighed_BK = logits_BK if head.bias is None else logits_BK - head.bias.float()
    error = (A_BKhw.mean((2, 3)) @ head.weight.float().T - weighed_BK).abs().max()
    scale = weighed_BK.abs().max()
    rounding = max(1e-3, 8 * torch.finfo(head.weight.dtype).eps)  # a half-precision model's logits are coarse
    return bool((scale > 0) & (error <= rounding * scale + 1e-6 * logits_BK.abs().max()))
