"""ShapleyCAM: channels weighted by the gradient and the curvature of the score.

Shape suffixes: B batch, C H W the network's input, K channels (classes of logits), h w the layer's grid.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saltern.pipeline.methods.base import Each, Method, weighted_sum
from saltern.pipeline.models.compiling import parts_up_to
from saltern.pipeline.models.passes import Score, frozen, full_precision
from saltern.pipeline.models.probe import probe
from saltern.pipeline.models.taps import Taps
from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError


class ShapleyCAM(Method):
    """ReLU of the activations weighted by the mean of G - H A / 2, their Shapley values to second order (Cai 2025).

    G and H are gradient and Hessian of the utility in the activations A; H A is computed as one vector. The utility of
    the paper adds the class's log-probability to its logit. The logit alone has no curvature where the network
    after the layer is piecewise linear: there, H A = 0 and the map is that of grad-cam.
    """

    name = "shapley-cam"
    cost = "1 forward, and 2 backwards down to the layer"
    layered = True
    comparable = True

    utility: Annotated[
        Literal["rest", "logit"], "What is shared out: rest = logit + log-probability of the class; logit."
    ] = "rest"

    def prepare(self) -> None:
        self._taps = Taps(self.model, self.layer)

    def trunk(self) -> Sequence[nn.Module]:
        with frozen(self.model):
            return parts_up_to(self.model, self._taps.modules, probe(self.model, self.input_side)[:1])

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
            logits_BK, outputs = self._taps.forward(x_BCHW, differentiable=True)
            scores = self.scores(logits_BK, target_B, number)
            image, maps = x_BCHW.shape[2:], []
            for left, score in zip(reversed(range(len(scores))), scores, strict=True):
                weight = self._weight(self._utility(logits_BK, score), outputs, keep=left > 0)
                with full_precision(x_BCHW.device), torch.no_grad():
                    weight_BK = self._taps.grid(0, weight, image).mean((2, 3))
                    maps.append(weighted_sum(weight_BK, self._taps.grid(0, outputs[0], image)).relu())
        return maps, logits_BK, scores

    def _utility(self, logits_BK: Tensor, score: Score) -> Tensor:
        """Return the sum of the utilities of the batch; in eval mode samples do not mix."""
        utility_B = score.of(logits_BK)
        if self.utility == "rest":
            utility_B = utility_B + Score(score.class_B).of(logits_BK.to(utility_B.dtype).log_softmax(1))
        return utility_B.sum()

    def _weight(self, utility: Tensor, outputs: Sequence[Tensor], *, keep: bool) -> Tensor:
        """Return G - H A / 2 in the form of the layer's output, of which every part counts as A.

        Args:
            keep: the graph, for another utility.
        """
        with full_precision(utility.device):
            gradients = torch.autograd.grad(utility, outputs, create_graph=True, allow_unused=True)
            (G,) = self._taps.all_reached(gradients)
            if not G.requires_grad:  # the utility is linear in the layer
                return G
            try:
                (HA,) = torch.autograd.grad(G, outputs, outputs[0].detach(), retain_graph=keep, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise UserError(
                    f"shapley-cam differentiates twice, and {type(self.model).__name__} has an operation without that: "
                    f"{brief(error)}; use grad-cam"
                ) from error
            return G.detach() if HA is None else G.detach() - HA / 2
