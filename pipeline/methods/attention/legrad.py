"""Gradients of attention weights A, each of a score that its own block gives.

Shape suffixes: B batch, C H W the network's input, K classes, M heads, Q queries, S keys, T tokens, D their channels.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.methods.attention.weights import AttentionMethod
from saltern.pipeline.methods.base import Each
from saltern.pipeline.methods.cams.tail import Recording, Tail
from saltern.pipeline.models.attention import Weights, leaf, visiting
from saltern.pipeline.models.outputs import tensor_of, with_tensor
from saltern.pipeline.models.passes import score_gradients
from saltern.schemas.errors import UserError


class LeGrad(AttentionMethod):
    """Sum over the blocks of (ds/dA)+, averaged over heads and queries (Bousselham 2024, LeGrad).

    The score s of a block is the logit of the mean of its own tokens, brought through what follows the last block; A is
    the block's own. In a model that pools by attention, all tokens of the block are pooled, and A is of that pooling.
    The layer is the first block that counts, by default that of the model.
    """

    name = "legrad"
    cost = "1 forward, and the backward of each block by itself"
    from_first = True

    def prepare(self) -> None:
        self._blocks = [call for call in self.calls if call.queries == call.keys]
        if not self._blocks or any(call.block == call.module for call in self._blocks):
            raise UserError(
                "legrad needs blocks that give tokens, as members of a list of modules, and "
                f"{type(self.model).__name__} has none from layer {self.layer[0]!r} on; take grad-eclip or chefer"
            )
        self._tail = Tail(self.model, self._blocks[-1].block)

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        recording, tokens, weights = self._recorded(x_BCHW)
        scores = self.scores(recording.logits_BK, target_B, number)
        rows = [x_BCHW.new_zeros((), dtype=torch.float32)] * number
        for index, tokens_BTD in enumerate(tokens):
            if self.tower.pools:
                logits_BK, A_BMQS = self._pooled(recording, tokens_BTD)
            else:
                logits_BK = recording.logits(tokens_BTD.mean(1, keepdim=True).expand_as(tokens_BTD))
                A_BMQS = weights[index]
            for rank, score in enumerate(scores):
                (gradient,) = score_gradients(logits_BK, score, [A_BMQS], keep=rank + 1 < number)
                rows[rank] = rows[rank] + self.reached(gradient).float().relu().mean((1, 2))
        return [self.map_of(row_BS, x_BCHW.shape[2:]) for row_BS in rows], recording.logits_BK, scores

    def _recorded(self, x_BCHW: Tensor) -> tuple[Recording, list[Tensor], list[Tensor]]:
        """Run the model with each block cut off from those before it. Return the tokens and weights of the blocks."""
        tokens: list[Tensor] = []
        weights: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            given = tensor_of(output, self._blocks[0].block)
            if given.ndim != 3 or len(given) != len(x_BCHW):
                raise UserError(f"legrad needs tokens (B, T, D) of each block, and one gives {tuple(given.shape)}")
            tokens.append(given)
            return with_tensor(output, given.detach())

        blocks = dict.fromkeys(self.model.get_submodule(call.block) for call in self._blocks)
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_hook(cut).remove)
            stack.enter_context(visiting([] if self.tower.pools else self.modules, _leaves(weights)))
            recording = self._tail.record(x_BCHW)
        count = len(self._blocks)  # a tail that cannot use records has run the blocks again
        return recording, tokens[:count], weights[:count]

    def _pooled(self, recording: Recording, tokens_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of a block's tokens, and the weights by which they are pooled."""
        weights: list[Tensor] = []
        with visiting([self.model.get_submodule(self.calls[-1].module)], _leaves(weights)):
            logits_BK = recording.logits(tokens_BTD)
        return logits_BK, weights[-1]


def _leaves(weights: list[Tensor]) -> Weights:
    """Return a visitor that collects weights that require gradients."""

    def keep(A_BMQS: Tensor) -> Tensor:
        weights.append(leaf(A_BMQS))
        return weights[-1]

    return Weights(keep)
