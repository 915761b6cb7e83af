"""The CAM family: channels of a target layer, weighted and summed.

Shape suffixes: B batch, C H W the network's input, K channels, h w the layer's grid.
"""

import torch
from torch import Tensor, nn

from pipeline.methods.base import Maps, Method, register
from pipeline.methods.layers import probe
from pipeline.methods.scores import full_precision, pick_target
from pipeline.methods.taps import Taps
from schemas.errors import UserError


class GradientCAM(Method):
    """Base of the CAMs that need the activation A and its gradient G = dz_c/dA. They write `combine`."""

    layered = True
    many_layers = True

    def prepare(self) -> None:
        self._taps = Taps(self.model, self.layer)

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        """map_Bhw from float32 activations and gradients of one layer."""
        raise NotImplementedError

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        logits_BK, outputs = self._taps.forward(x_BCHW, differentiable=True)
        target_B = pick_target(logits_BK, target_B)
        gradients = self._taps.gradients(logits_BK, target_B, outputs)
        image = x_BCHW.shape[2:]
        with full_precision(x_BCHW.device), torch.no_grad():
            maps = tuple(
                self.combine(self._taps.grid(index, output, image), self._taps.grid(index, gradient, image))
                for index, (output, gradient) in enumerate(zip(outputs, gradients, strict=True))
            )
        return maps, logits_BK, target_B


@register("grad-cam")
class GradCAM(GradientCAM):
    """ReLU of the activations weighted by the mean gradient of the logit (Selvaraju 2017, eq. 1-2)."""

    def combine(self, A_BKhw: Tensor, G_BKhw: Tensor) -> Tensor:
        return weighted_sum(G_BKhw.mean((2, 3)), A_BKhw).relu()


@register("cam")
class CAM(Method):
    """Activations weighted by the linear head after global average pooling; signed, no gradient (Zhou 2016, eq. 2).

    On such a network its ReLU equals h * w times Grad-CAM. A functional ReLU between the layer and the pooling
    (DenseNet) belongs to the activation. The head's bias is left out.
    """

    layered = True

    def prepare(self) -> None:
        self._taps = Taps(self.model, self.layer)
        heads = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        x_BCHW = probe(self.model)
        with torch.no_grad(), full_precision(x_BCHW.device):
            logits_BK, outputs = self._taps.forward(x_BCHW)
            A_BKhw = self._taps.grid(0, outputs[0], x_BCHW.shape[2:])
            for rectified in (False, True):
                if heads and _explains(heads[-1], A_BKhw.relu() if rectified else A_BKhw, logits_BK.float()):
                    self._head, self._rectified = heads[-1], rectified
                    return
        raise UserError(
            f"cam needs a linear head right after global average pooling of its layer, and {type(self.model).__name__} "
            f"with layer {self.layer[0]!r} has none; use grad-cam"
        )

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        logits_BK, outputs = self._taps.forward(x_BCHW)
        target_B = pick_target(logits_BK, target_B)
        with full_precision(x_BCHW.device):
            A_BKhw = self._taps.grid(0, outputs[0], x_BCHW.shape[2:])
            map_Bhw = weighted_sum(self._head.weight[target_B].float(), A_BKhw.relu() if self._rectified else A_BKhw)
        return map_Bhw, logits_BK, target_B


def weighted_sum(weight_BK: Tensor, A_BKhw: Tensor) -> Tensor:
    """sum_k weight_k * A_k, map_Bhw."""
    return torch.einsum("bk,bkhw->bhw", weight_BK, A_BKhw)


def _explains(head: nn.Linear, A_BKhw: Tensor, logits_BK: Tensor) -> bool:
    # Checked, not assumed: head(mean(A)) must give the model's logits; the bias is left out lest it hide a difference.
    if A_BKhw.shape[1] != head.in_features or logits_BK.shape[1] != head.out_features:
        return False
    weighed_BK = logits_BK if head.bias is None else logits_BK - head.bias.float()
    error = (A_BKhw.mean((2, 3)) @ head.weight.float().T - weighed_BK).abs().max()
    scale = weighed_BK.abs().max()
    return bool((scale > 0) & (error <= 1e-3 * scale + 1e-6 * logits_BK.abs().max()))
