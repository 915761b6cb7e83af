"""Draw a model's weights again, layer by layer, from the logits down."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saltern.pipeline.models.passes import frozen, logits_of
from saltern.pipeline.models.probe import probe, watched
from saltern.schemas.sizes import Side

Pair = tuple[Tensor, Tensor]  # a parameter or buffer, and its value
_STD = 0.02  # of parameters of a module that has no reset of its own, as transformers draw theirs


def layers_from_the_logits(model: nn.Module, side: Side | None = None) -> list[str]:
    """Return the names of the modules that hold parameters, in the opposite order of the forward pass.

    The order is that of a pass over random images of `side` pixels. A module that is called more than once counts by
    its last call, and one whose parameters its parent uses without calling it (as attention does) by its parent's.
    Parameters that the logits do not depend on are left out.
    """
    calls: dict[str, int] = {}
    clock = itertools.count()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = next(clock)

        return hook

    with frozen(model):
        watched(model, probe(model, side), {module: note(name) for name, module in model.named_modules()})
    used = _used(model, side)

    def position(name: str) -> int:
        while name not in calls and name:
            name = name.rpartition(".")[0]
        return calls.get(name, -1)

    held = [name for name, module in model.named_modules() if used & set(map(id, module.parameters(recurse=False)))]
    return sorted(held, key=position, reverse=True)


def _used(model: nn.Module, side: Side | None) -> set[int]:
    """Return the ids of the parameters that the logits of random images depend on."""
    parameters = list(model.parameters())
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            logits_BK = logits_of(model(probe(model, side)))
            gradients = torch.autograd.grad(logits_BK.sum(), parameters, allow_unused=True)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
    return {id(one) for one, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


class Randomised:
    """A copy of a model whose layers become random, group after group. Iterating starts again from the trained model.

    A layer gets the values of its own `reset_parameters`: PyTorch's defaults for convolutions and linear layers; for
    batch normalisation weight 1, bias 0, running mean 0 and variance 1. Parameters of a module without one are normal
    with a deviation of 0.02. The values depend on the seed and the layer's place alone, not on the device. They are
    drawn once, and are copied on the device for each iteration.

    Args:
        model: left as it is.
        layers: names, in the order in which they are drawn.
        seed: of the draws.
        stages: at most so many copies, in equal groups of layers; None: one for each layer.
    """

    def __init__(self, model: nn.Module, layers: list[str], *, seed: int = 0, stages: int | None = None):
        self._model = copy.deepcopy(model)
        count = min(stages or len(layers), len(layers))
        ends = [round(len(layers) * (stage + 1) / count) for stage in range(count)]
        self._groups = [layers[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        drawn = {
            name: _draw(self._model.get_submodule(name), seed * 100_003 + place) for place, name in enumerate(layers)
        }
        self._random: dict[str, list[Pair]] = drawn
        self._trained = [(own, own.clone()) for pairs in drawn.values() for own, _ in pairs]

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name of the last layer that is random, and the model, which is the same object each time."""
        _copy(self._trained)
        for group in self._groups:
            for name in group:
                _copy(self._random[name])
            yield group[-1], self._model


def _draw(module: nn.Module, seed: int) -> list[Pair]:
    """Return the module's own parameters and buffers, each with its random values."""
    fresh = copy.deepcopy(module).cpu()
    reset = getattr(fresh, "reset_parameters", None) or getattr(fresh, "_reset_parameters", None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if reset is not None:
            reset()
        else:
            for parameter in fresh.parameters(recurse=False):
                nn.init.normal_(parameter, std=_STD)
    kinds = ("_parameters", "_buffers")
    every = ((old, getattr(fresh, kind)[name]) for kind in kinds for name, old in getattr(module, kind).items())
    return [(old, new.detach().to(old.device)) for old, new in every if old is not None]


def _copy(pairs: Iterable[Pair]) -> None:
    with torch.no_grad():
        for own, value in pairs:
            own.copy_(value)
