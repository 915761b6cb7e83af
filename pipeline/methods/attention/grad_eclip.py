"""Grad-ECLIP: values weighted by the gradient of what attention gives, and by how alike queries and keys are.

Shape suffixes: B batch, C H W the network's input, M heads, Q queries, S keys, D channels of a head, E of all heads,
R queries that describe the image, P patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.methods.attention.weights import AttentionMethod
from saltern.pipeline.methods.base import Each, safe_divide
from saltern.pipeline.models.attention import Heads, leaf, visiting
from saltern.pipeline.models.compiling import parts_up_to
from saltern.pipeline.models.passes import frozen, full_precision, gradients_of_each, logits_of
from saltern.pipeline.models.probe import probe


class GradECLIP(AttentionMethod):
    """ReLU of the values times the gradient of the class token's output, each patch weighted (Zhao 2024, Grad-ECLIP).

    The weight of a patch is the cosine of its key and the class token's query, scaled to [0, 1] over the patches. Heads
    are concatenated. If the model averages its patches, each of them is a query, and the products are summed.
    """

    name = "grad-eclip"
    cost = "1 forward, and the backward down to the block"

    def trunk(self) -> Sequence[nn.Module]:
        with frozen(self.model):
            parts = parts_up_to(self.model, self.modules, probe(self.model, self.input_side)[:1])
        return [part for part in parts if part not in self.modules]

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        found: list[tuple[Tensor, ...]] = []

        def keep(q_BMQD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, o_BMQD: Tensor) -> Tensor:
            found[:] = [(q_BMQD, k_BMSD, v_BMSD, leaf(o_BMQD))]
            return found[0][-1]

        with visiting(self.modules, Heads(keep)):
            logits_BK = logits_of(self.model(x_BCHW))
        q_BMQD, k_BMSD, v_BMSD, o_BMQD = found[0]
        scores, image, maps = self.scores(logits_BK, target_B, number), x_BCHW.shape[2:], []
        with full_precision(x_BCHW.device), torch.no_grad():
            patches = slice(k_BMSD.shape[2] - self.map_of(k_BMSD[:1, 0, :, 0], image)[0].numel(), None)
            alike_BRP = _alike(_joined(q_BMQD)[:, self.queries], _joined(k_BMSD)[:, patches])
            v_BPE = _joined(v_BMSD)[:, patches]
        for (gradient,) in gradients_of_each(logits_BK, scores, [o_BMQD]):
            with full_precision(x_BCHW.device), torch.no_grad():
                g_BRE = _joined(self.reached(gradient))[:, self.queries]
                row_BP = (g_BRE @ v_BPE.mT * alike_BRP).sum(1).relu()
                maps.append(self.map_of(row_BP, image))
        return maps, logits_BK, scores


def _joined(part_BMSD: Tensor) -> Tensor:
    """Return the heads of each token side by side, float32 (B, S, E)."""
    return part_BMSD.float().transpose(1, 2).flatten(2)


def _alike(q_BRE: Tensor, k_BPE: Tensor) -> Tensor:
    """Return the cosines of queries and keys, scaled to [0, 1] over the keys; 0 if all are equal."""
    cosine_BRP = F.normalize(q_BRE, dim=2) @ F.normalize(k_BPE, dim=2).mT
    low_BR1, high_BR1 = cosine_BRP.amin(2, keepdim=True), cosine_BRP.amax(2, keepdim=True)
    return safe_divide(cosine_BRP - low_BR1, high_BR1 - low_BR1)
