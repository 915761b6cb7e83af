"""Outputs of target layers in a forward pass, and the gradients of the logits with respect to them.

Shape suffixes: B batch, C H W the network's input, K channels of a layer (classes of logits), h w its grid, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from saltern.pipeline.models.outputs import tensor_of, with_tensor
from saltern.pipeline.models.passes import Score, gradients_of_each, logits_of
from saltern.schemas.errors import UserError

_MAX_PREFIX = 16  # class and register tokens before the patches


class Taps:
    """Target layers of a model, whose outputs a forward pass keeps.

    Args:
        names: dotted names, known to the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = list(names)
        self.modules = [model.get_submodule(name) for name in names]
        # A shared module (one ReLU for a whole block) runs several times a pass; its last output counts.
        self._last_call = [1] * len(names)
        kinds = (type(module).__name__ for module in model.modules())
        self._tokens_last = any(kind.startswith("SwinTransformer") for kind in kinds)  # N h w K inside

    def forward(self, x_BCHW: Tensor, *, differentiable: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return logits and the layers' raw outputs (see `grid`), in the order of the names.

        Args:
            differentiable: the layers' outputs require gradients. Because parameters are frozen, modules before the
                first target layer record nothing for a backward pass.

        Raises:
            UserError: a layer that does not run, or whose output holds no tensor.
        """
        outputs: list[Tensor | None] = [None] * len(self.names)
        calls = [0] * len(self.names)
        handles = [
            module.register_forward_hook(self._keeper(index, outputs, calls, differentiable))
            for index, module in enumerate(self.modules)
        ]
        try:
            logits_BK = logits_of(self.model(x_BCHW))
        finally:
            for handle in handles:
                handle.remove()
        for name, count in zip(self.names, calls, strict=True):
            if not count:
                raise UserError(f"layer {name!r} does not run in the forward pass; choose another")
        kept = [output for output in outputs if output is not None]
        fewer = len(kept) < len(calls)
        self._last_call = [1] * len(calls) if fewer else calls
        return self.forward(x_BCHW, differentiable=differentiable) if fewer else (logits_BK, kept)

    def _keeper(
        self, index: int, outputs: list[Tensor | None], calls: list[int], differentiable: bool
    ) -> Callable[[nn.Module, Any, Any], Any]:
        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            calls[index] += 1
            if calls[index] < self._last_call[index]:
                return None
            given = tensor_of(output, self.names[index])
            if differentiable and not given.requires_grad:
                given = given.detach().requires_grad_()
            outputs[index] = given
            # The model continues with a copy, so that a following in-place ReLU does not change the kept output.
            return with_tensor(output, given.clone())

        return keep

    def gradients(
        self, logits_BK: Tensor, scores: Sequence[Score], outputs: Sequence[Tensor]
    ) -> Iterator[list[Tensor]]:
        """Yield ds / d output of every layer for each of the scores.

        Raises:
            UserError: the logits do not depend on a layer.
        """
        return map(self.all_reached, gradients_of_each(logits_BK, scores, outputs))

    def all_reached(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the gradients of all layers. Raises UserError if one is None: the logits ignore its layer."""
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                raise UserError(f"the logits do not depend on layer {name!r}; choose another")
        return [gradient for gradient in gradients if gradient is not None]

    def grid(self, index: int, output: Tensor, image: Sequence[int]) -> Tensor:
        """Return a layer's output or its gradient as float32 (B, K, h, w), detached.

        Tokens are laid out on their grid, without those before the patches (class, registers).

        Args:
            image: height and width of the network's input.

        Raises:
            UserError: the output has no grid.
        """
        output = output.detach().float()
        if output.ndim == 4:
            return output.movedim(self.channel_dimension(index, output, image), 1)
        layout = token_grid(output.shape[1], image) if output.ndim == 3 else None
        if layout is None:
            raise UserError(
                f"layer {self.names[index]!r} gives {tuple(output.shape)}, which is no grid; choose one before pooling"
            )
        patches_BTK = output[:, -layout[0] * layout[1] :]
        return patches_BTK.transpose(1, 2).reshape(len(output), -1, *layout)

    def channel_dimension(self, index: int, output: Tensor, image: Sequence[int]) -> int:
        """Return the dimension of the channels: 1, or -1 for tokens and channels-last grids."""
        is_norm = type(self.modules[index]) is nn.LayerNorm  # normalises the last dimension: that is K
        return -1 if output.ndim == 3 or is_norm or self._channels_last(output, image) else 1

    def _channels_last(self, output: Tensor, image: Sequence[int]) -> bool:
        first, last = is_scaled(output.shape[2:], image), is_scaled(output.shape[1:3], image)
        return last and (self._tokens_last or not first)


def is_scaled(grid: Sequence[int], image: Sequence[int]) -> bool:
    """Return whether a grid has the image's aspect ratio, up to the rounding to whole cells."""
    return abs(grid[0] * image[1] - grid[1] * image[0]) <= max(image)


def token_grid(tokens: int, image: Sequence[int]) -> tuple[int, int] | None:
    """Return height and width of the patches' grid among all tokens; None if they have none.

    Args:
        image: height and width of the network's input.
    """
    for prefix in range(min(_MAX_PREFIX, tokens - 1) + 1):
        height = round(((tokens - prefix) * image[0] / image[1]) ** 0.5)
        width = (tokens - prefix) // height if height else 0
        if height * width == tokens - prefix and height * image[1] == width * image[0]:
            return height, width
    return None
