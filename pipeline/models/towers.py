"""Transformers as attention sees them: the calls of attention, and the queries that reach the logits.

Shape suffixes: B batch, C H W the network's input, K classes, M heads, Q queries, S keys, D channels of a head, h w the
patches' grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saltern.pipeline.models.attention import Heads, Visitor, Weights, interception, visiting
from saltern.pipeline.models.grids import follows, moved_patch
from saltern.pipeline.models.interception import check_visible, replaced
from saltern.pipeline.models.passes import logits_of
from saltern.pipeline.models.probe import watched
from saltern.pipeline.models.taps import token_grid
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side

_SINGLES = 16  # queries of a pooling by attention that are tried one by one


@dataclass(frozen=True)
class Call:
    """One call of attention."""

    module: str  # innermost one that makes it, by dotted name
    block: str  # the block of the module, or the module
    batch: int
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Tower:
    """Attention between all tokens, in the order of the calls. The last one is read by what makes the logits.

    That is a block whose class token or whose patches are pooled, or a pooling by attention.
    """

    calls: list[Call]
    prefix: int  # class and register tokens before the patches
    read: slice | None  # queries of the last call that reach the logits; None = all patches

    @property
    def pools(self) -> bool:
        """Whether the last call is a pooling by attention."""
        return self.calls[-1].queries != self.calls[-1].keys

    def index(self, name: str) -> int:
        """Return the number of the call of a block, given by its name or that of one of its parts. Raises UserError."""
        found = [
            number
            for number, call in enumerate(self.calls)
            if f"{call.module}.".startswith(f"{name}.") or f"{name}.".startswith(f"{call.block}.")
        ]
        if len({self.calls[number].module for number in found}) != 1:
            blocks = ", ".join(dict.fromkeys(call.block for call in self.calls))
            raise UserError(f"layer {name!r} is not one block with attention; choose one of {blocks}")
        return found[-1]

    def queries(self, index: int) -> slice:
        """Return the queries of a call that describe the image: class tokens, else all patches, or those that pool."""
        if self.pools and self.calls[index] is self.calls[-1]:
            return self.read or slice(None)
        return slice(self.prefix, None) if self.pools or self.read is None else self.read


def find_tower(model: nn.Module, side: Side | None, method: str) -> Tower:
    """Return a model's attention, measured with images of the run's size. The model is in eval mode, without gradients.

    Args:
        side: of the images, pixels; None = as of `probe`.
        method: that needs it, for messages.

    Raises:
        UserError: the model has no attention, or attention of parts of the image, or its tokens do not lie over the
            image, or it is compiled.
    """
    check_visible(model, method)
    notes = _Notes()
    x_BCHW = moved_patch(model, side)
    within = {module: notes.within(name, module.forward) for name, module in model.named_modules()}
    with replaced(within), interception(notes), torch.no_grad():
        watched(model, x_BCHW, {})
    calls = [_call(model, name, shapes) for name, shapes in notes.calls]
    grid = token_grid(calls[-1].keys, x_BCHW.shape[2:]) if calls else None
    reason = _misfit(calls, len(x_BCHW), grid)
    if not reason and grid and notes.k_BMSD is not None:
        k_BMSD = notes.k_BMSD[:, :, -grid[0] * grid[1] :].float()
        if min(grid) > 1 and not follows(k_BMSD.mT.reshape(len(x_BCHW), -1, *grid)):
            reason = f"has {grid[0]} x {grid[1]} tokens that do not follow a patch moved in the image"
    if reason or grid is None:
        raise UserError(
            f"method {method} needs attention between all patches of the image, and {type(model).__name__} {reason}; "
            "take grad-cam, layer-cam, gradient or another method that needs none"
        )
    prefix = calls[-1].keys - grid[0] * grid[1]
    return Tower(calls, prefix, _read(model, x_BCHW[:1], calls[-1], prefix))


def _misfit(calls: list[Call], batch: int, grid: tuple[int, int] | None) -> str:
    """Return why calls are no tower; "" if they are."""
    if not calls:
        return "has no attention"
    *others, last = calls
    if any(call.batch != batch for call in calls):
        return "attends within windows"
    if any((call.queries, call.keys) != (last.keys, last.keys) for call in others):
        return "attends to other tokens in some blocks than in the last"
    return "" if grid else f"has {last.keys} tokens, which are no grid of the image"


class _Notes:
    """Visitor that notes the calls of a whole model."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []  # module, and batch, heads, queries, keys
        self.k_BMSD: Tensor | None = None  # of the last call
        self._running: list[str] = []

    def within(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._running.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                self._running.pop()

        return call

    def attend(self, q_BMQD: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        self.calls.append((self._running[-1], (*q_BMQD.shape[:3], k_BMSD.shape[2])))
        self.k_BMSD = k_BMSD
        return F.scaled_dot_product_attention(q_BMQD, k_BMSD, v_BMSD, bias, scale=scale)

    def weigh(self, A_BMQS: Tensor) -> Tensor:
        self.calls.append((self._running[-1], tuple(A_BMQS.shape)))
        self.k_BMSD = None
        return A_BMQS


def _call(model: nn.Module, name: str, shapes: tuple[int, ...]) -> Call:
    batch, heads, queries, keys = shapes
    return Call(name, _block(model, name), batch, heads, queries, keys)


def _block(model: nn.Module, name: str) -> str:
    """Return the innermost part of a list of modules that holds a module; without one, the module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        parent = model.get_submodule(".".join(parts[: end - 1]))
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            return ".".join(parts[:end])
    return name


def _read(model: nn.Module, x_BCHW: Tensor, last: Call, prefix: int) -> slice | None:
    """Return the queries of the last call that reach the logits: among the first ones, else none, for all others.

    NaN is put in the outputs of some queries of each image, and the logits show whether it arrives.
    """
    singles = min(last.queries, _SINGLES) if last.queries != last.keys else prefix
    groups = [slice(index, index + 1) for index in range(singles)]
    groups += [slice(singles, None)] if singles < last.queries else []

    def spoil(output_BMQD: Tensor) -> Tensor:
        output_BMQD = output_BMQD.clone()
        for image, group in enumerate(groups):
            output_BMQD[image, :, group] = torch.nan
        return output_BMQD

    visitor: Visitor = _Spoiling(spoil)
    with visiting([model.get_submodule(last.module)], visitor), torch.no_grad():
        logits_BK = logits_of(model(x_BCHW.repeat(len(groups), 1, 1, 1)))
    reached = logits_BK.isnan().any(1).tolist()
    if not any(reached):
        raise UserError(f"the logits of {type(model).__name__} do not depend on the attention of {last.module}")
    found = [index for index in range(singles) if reached[index]]
    return slice(found[0], found[-1] + 1) if found else None


class _Spoiling(Heads):
    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lambda q, k, v, output_BMQD: spoil(output_BMQD))
        self.weigh = Weights(spoil).weigh  # type: ignore[method-assign]
