"""Maps from attention weights A, and from their gradients dA.

Shape suffixes: B batch, C H W the network's input, K classes, M heads, Q queries, S keys (of a block as many), h w the
patches' grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from saltern.pipeline.methods.base import Each, Method
from saltern.pipeline.models import layers
from saltern.pipeline.models.attention import Weights, leaf, visiting
from saltern.pipeline.models.compiling import large_parts
from saltern.pipeline.models.passes import Score, full_precision, logits_of, score_gradients
from saltern.pipeline.models.taps import token_grid
from saltern.pipeline.models.towers import Call, Tower, find_tower
from saltern.schemas.errors import UserError


class AttentionMethod(Method):
    """Base of the methods on attention. Their layer is a block, given by its name or that of its attention.

    The map has a cell for each patch; class and register tokens are left out. A block is read at its class token if
    that reaches the logits; else, in a model that averages its patches, at all patches. A pooling by attention is the
    last block.
    """

    layered = True
    layers_are_grids = False
    comparable = True
    from_first = False  # by default all blocks count, not the last one alone

    tower: Tower
    calls: list[Call]  # of the layer, or from it on

    def find_layers(self, layer: str | Sequence[str] | None) -> list[str]:
        self.tower = find_tower(self.model, self.input_side, self.title())
        names = layers.resolve(self.model, layer) if layer else []
        first = self.tower.index(names[0]) if names else 0 if self.from_first else len(self.tower.calls) - 1
        self.calls = self.tower.calls[first:] if self.from_first else self.tower.calls[first : first + 1]
        return names if len(names) > 1 else [self.calls[0].block]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that make the calls."""
        return [self.model.get_submodule(name) for name in dict.fromkeys(call.module for call in self.calls)]

    @property
    def queries(self) -> slice:
        """The queries of the last call that describe the image."""
        return self.tower.queries(self.tower.calls.index(self.calls[-1]))

    def start(self, A_BQS: Tensor) -> Tensor:
        """Return row_BQ, equal shares of the queries that describe the image."""
        row_BQ = A_BQS.new_zeros(A_BQS.shape[:2])
        row_BQ[:, self.queries] = 1
        return row_BQ / row_BQ.sum(1, keepdim=True)

    def map_of(self, row_BS: Tensor, image: Sequence[int]) -> Tensor:
        """Return map_Bhw, the values of the patches among those of all keys. Raises UserError if they have no grid."""
        grid = token_grid(row_BS.shape[1], image)
        if grid is None:
            raise UserError(f"{row_BS.shape[1]} tokens are no grid of an image of {image[0]} x {image[1]} pixels")
        return row_BS[:, -grid[0] * grid[1] :].reshape(-1, *grid)

    def reached(self, gradient: Tensor | None) -> Tensor:
        """Return a gradient. Raises UserError if it is None: the logits ignore the layer."""
        if gradient is None:
            raise UserError(f"the logits do not depend on the attention of {self.layer[0]}; choose another block")
        return gradient


class WithoutTarget(AttentionMethod):
    """Base of the methods on attention weights alone. A subclass implements `kept` and `combined`."""

    cost = "1 forward"
    needs_target = False

    def kept(self, A_BMQS: Tensor) -> Tensor:
        """Return what is kept of the weights of a call."""
        raise NotImplementedError

    def combined(self, kept: Sequence[Tensor]) -> Tensor:
        """Return row_BS from what was kept of each call, in their order."""
        raise NotImplementedError

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        found: list[Tensor] = []

        def keep(A_BMQS: Tensor) -> Tensor:
            found.append(self.kept(A_BMQS.float()))
            return A_BMQS

        with torch.no_grad():
            with visiting(self.modules, Weights(keep)):
                logits_BK = logits_of(self.model(x_BCHW))
            with full_precision(x_BCHW.device):
                map_Bhw = self.map_of(self.combined(found[-len(self.calls) :]), x_BCHW.shape[2:])
        others = logits_BK.topk(number, 1).indices.unbind(1)[1:] if number > 1 else ()
        return [map_Bhw] * number, logits_BK, [None, *others]


class Attention(WithoutTarget):
    """Attention of one block from the class token to the patches, the mean of its heads or one (Caron 2021, DINO).

    The default is the last block. In a model that averages its patches, the mean of what all patches attend to.
    """

    name = "attention"

    head: Annotated[int | None, "Head, counted from 0; None = the mean of all."] = None

    def prepare(self) -> None:
        heads = self.calls[0].heads
        if self.head is not None and not 0 <= self.head < heads:
            raise UserError(
                f"head={self.head} of attention must be 0 to {heads - 1}: {self.layer[0]} has {heads} heads"
            )

    def trunk(self) -> Sequence[nn.Module]:
        return [part for part in large_parts(self.model, self.modules) if part not in self.modules]

    def kept(self, A_BMQS: Tensor) -> Tensor:
        A_BMQS = A_BMQS if self.head is None else A_BMQS[:, self.head, None]
        return A_BMQS[:, :, self.queries].mean((1, 2))

    def combined(self, kept: Sequence[Tensor]) -> Tensor:
        return kept[0]


class Rollout(WithoutTarget):
    """Product over the blocks of (A + 1) / 2, heads averaged, read at the class token (Abnar 2020, section 3).

    The layer is the first block that counts, by default that of the model. A pooling by attention has no residual.
    """

    name = "rollout"
    from_first = True

    def kept(self, A_BMQS: Tensor) -> Tensor:
        return A_BMQS.mean(1)

    def combined(self, kept: Sequence[Tensor]) -> Tensor:
        row_BQ = self.start(kept[-1])
        for A_BQS in reversed(kept):  # a row times a matrix a block, not a product of matrices
            passed_BS = (row_BQ[:, None] @ A_BQS)[:, 0]
            row_BQ = (passed_BS + row_BQ) / 2 if A_BQS.shape[1] == A_BQS.shape[2] else passed_BS
        return row_BQ


class Chefer(AttentionMethod):
    """Product over the blocks of 1 + mean over heads of (dA * A)+, read at the class token (Chefer 2021, eq. 5-6).

    dA is the gradient of the score. The layer is the first block that counts, by default that of the model. A pooling
    by attention has no residual (eq. 8).
    """

    name = "chefer"
    cost = "1 forward, 1 backward"
    from_first = True

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        found: list[Tensor] = []

        def keep(A_BMQS: Tensor) -> Tensor:
            found.append(A_BMQS if A_BMQS.requires_grad else leaf(A_BMQS))
            return found[-1]

        with visiting(self.modules, Weights(keep)):
            logits_BK = logits_of(self.model(x_BCHW))
        weights, image = found[-len(self.calls) :], x_BCHW.shape[2:]
        scores = self.scores(logits_BK, target_B, number)
        maps = [
            self.map_of(self._relevance(logits_BK, score, weights, keep=index < number), image)
            for index, score in enumerate(scores, 1)
        ]
        return maps, logits_BK, scores

    def _relevance(self, logits_BK: Tensor, score: Score, weights: Sequence[Tensor], *, keep: bool) -> Tensor:
        """Return row_BS. Gradients arrive from the last block to the first; each is used and dropped at once."""
        row = [self.start(weights[-1][:, 0].float())]

        def step(A_BMQS: Tensor, dA_BMQS: Tensor) -> None:
            E_BQS = (dA_BMQS * A_BMQS).float().relu().mean(1)
            passed_BS = (row[0][:, None] @ E_BQS)[:, 0]
            row[0] = row[0] + passed_BS if E_BQS.shape[1] == E_BQS.shape[2] else passed_BS

        handles = [
            A_BMQS.register_hook(partial(step, A_BMQS.detach()))  # type: ignore[no-untyped-call]
            for A_BMQS in weights
        ]
        try:
            self.reached(score_gradients(logits_BK, score, weights[:1], keep=keep)[0])
        finally:
            for handle in handles:
                handle.remove()
        return row[0]
