"""Weights that are cast to 16 bits once, for passes under autocast.

Autocast keeps no cast of a parameter that needs no gradient: every pass would cast every weight again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that notes which parameters operations cast, and which they use as they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cast: list[tuple[nn.Parameter, torch.dtype]] = []  # an entry for each cast
        self.plain: list[nn.Parameter] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, nn.Parameter):
                if func is torch.ops.aten._to_copy.default and kwargs and kwargs.get("dtype"):
                    self.cast.append((value, kwargs["dtype"]))
                else:
                    self.plain.append(value)
        return func(*args, **(kwargs or {}))


def cast_once(networks: Iterable[nn.Module], run: Callable[[], object]) -> None:
    """Replace the parameters that autocast casts by their casts, which have the originals as their `full`.

    Norms, and all that a network uses in float32, stay as they are.

    Args:
        run: a pass of the networks under autocast, with their parameters frozen.
    """
    with Casts() as casts:
        run()
    plain = set(map(id, casts.plain))
    halves: dict[int, nn.Parameter] = {}
    for parameter, dtype in casts.cast:
        if id(parameter) not in plain and id(parameter) not in halves:
            half = halves[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            half.full = parameter  # type: ignore[attr-defined]
    for module, name, parameter in _parameters(networks):
        module._parameters[name] = halves.get(id(parameter), parameter)


def full_of(value: Any) -> Any:
    """Return the original of a parameter that was cast once, and any other value itself."""
    return getattr(value, "full", value)


@contextmanager
def full_weights(network: nn.Module) -> Iterator[None]:
    """Give a network its original parameters while entered."""
    halves = [found for found in _parameters([network]) if full_of(found[2]) is not found[2]]
    for module, name, half in halves:
        module._parameters[name] = full_of(half)
    try:
        yield
    finally:
        for module, name, half in halves:
            module._parameters[name] = half


def _parameters(networks: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    modules = dict.fromkeys(module for network in networks for module in network.modules())
    return (
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
