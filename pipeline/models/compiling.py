"""The parts of a model that run without gradients, and their compilation."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saltern.schemas.errors import UserError


def large_parts(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the outermost modules that hold none of the layers, and the layers; only those made of other modules.

    A compiled single operation would gain nothing.
    """
    parts = [model] if not layers else _outermost(model, set(layers))
    return [part for part in dict.fromkeys(parts) if next(part.children(), None) is not None]


def _outermost(parent: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    for child in parent.children():
        if child in layers or layers.isdisjoint(child.modules()):
            yield child
        else:
            yield from _outermost(child, layers)


def parts_up_to(model: nn.Module, layers: Sequence[nn.Module], x_BCHW: Tensor) -> list[nn.Module]:
    """Return the large parts that have run when the first of the layers returns, and do not run afterwards."""
    calls: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(module)

    parts = large_parts(model, layers)
    handles = [module.register_forward_hook(note) for module in dict.fromkeys([*parts, *layers])]
    try:
        with torch.no_grad():
            model(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    # Of a layer that runs several times, the last run counts.
    end = 1 + min((len(calls) - 1 - calls[::-1].index(layer) for layer in layers if layer in calls), default=-1)
    later = set(calls[end:])
    return [part for part in parts if part in calls[:end] and part not in later]


def compile_parts(parts: Sequence[nn.Module], *, deterministic: bool) -> None:
    """Let the modules' forward functions compile at their first call, once for each shape."""
    import torch._dynamo.config
    import torch._inductor.config

    # Parts of one class share their forward function, and so its limit.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    known = hasattr(torch._inductor.config, "deterministic")  # since torch 2.10
    options: Any = {"deterministic": deterministic} if known else None
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False, options=options)


def refused(error: Exception) -> UserError | None:
    """Return the line for an error of the compiler; None for another error."""
    import torch._dynamo.exc

    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return None
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(f"torch.compile fails on this model and machine ({reason[:200]}); give --compile off")
