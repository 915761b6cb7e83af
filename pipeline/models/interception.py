"""A forward pass in which functions of torch are swapped, so that its backward pass follows other rules.

Modules, functional calls and operators all end in functions of torch, so in-place activations and modules that run
several times need no special treatment.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from saltern.schemas.errors import UserError

Swap = Callable[..., Any]


class Interception(TorchFunctionMode):
    """Context in which a function in `swaps` is replaced by its swap, with the same arguments.

    Args:
        swaps: replacements by function (`F.relu`, `torch.Tensor.add_`).
        otherwise: called with (function, args, kwargs) for all other functions of torch; None = call the function.
    """

    def __init__(
        self,
        swaps: Mapping[Callable[..., Any], Swap],
        otherwise: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self._swaps, self._otherwise = swaps, otherwise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        swap = self._swaps.get(func)
        if swap is None and self._otherwise is not None:
            return self._otherwise(func, args, kwargs or {})
        return (swap or func)(*args, **(kwargs or {}))


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules other forward functions while entered."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def check_visible(model: nn.Module, method: str) -> None:
    """Raise UserError if parts of the model are compiled, because functions inside them cannot be swapped."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise UserError(
                f"{method} swaps functions inside the model, and {name or type(model).__name__} is compiled; "
                "give the model as it was before torch.compile or torch.jit"
            )
