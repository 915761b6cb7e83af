"""Methods that take their maps from one forward pass, and from one backward pass a target; several can share both.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import torch
from torch import Tensor

from saltern.pipeline.methods.base import Each, Last, Maps, Method
from saltern.pipeline.models.passes import Score, full_precision
from saltern.pipeline.models.taps import Taps


class OnePass(Method):
    """Base of the methods that need only the outputs of their layers and, if they differentiate, the gradients there.

    A subclass implements `maps_of`.
    """

    layered = True
    comparable = True
    differentiates: ClassVar[bool] = True  # needs the gradients of the logits in the layers

    taps: Taps

    def prepare(self) -> None:
        self.taps = Taps(self.model, self.layer)

    def maps_of(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], score: Score, image: Sequence[int]
    ) -> Maps:
        """Return the maps of one target, for each layer. Runs without gradients and without autocast.

        Args:
            outputs: of each layer, as `Taps.forward` returns them.
            gradients: of the score in each of them; empty if the method does not differentiate.
            score: what is explained; a class-agnostic method ignores it.
            image: height and width of the network's input.
        """
        raise NotImplementedError

    def compute_each(self, x_BCHW: Tensor, target_B: Tensor | None, number: int) -> Each:
        return compute_together([self], x_BCHW, target_B, number)[0]


def compute_together(methods: Sequence[OnePass], x_BCHW: Tensor, target_B: Tensor | None, number: int) -> list[Each]:
    """Return what `compute_each` of each method returns, from one pass. All have the same model and layers.

    A class-agnostic method has the same map for each of several targets.
    """
    targeted = [method for method in methods if method.needs_target]
    target_B = target_B if targeted else None
    taps, differentiates = methods[0].taps, any(method.differentiates for method in methods)
    logits_BK, outputs = taps.forward(x_BCHW, differentiable=differentiates)
    scores = (targeted or methods)[0].scores(logits_BK, target_B, number)
    each = taps.gradients(logits_BK, scores, outputs) if differentiates else repeat([])
    maps: list[list[Maps]] = [[] for _ in methods]
    for score, gradients in zip(scores, each, strict=False):
        with full_precision(x_BCHW.device), torch.no_grad():
            for method, made in zip(methods, maps, strict=True):
                again = made and not method.needs_target
                made.append(made[0] if again else method.maps_of(outputs, gradients, score, x_BCHW.shape[2:]))
    agnostic: list[Score | None] = [None, *scores[1:]]
    return [
        (made, logits_BK, scores if method.needs_target else agnostic)
        for method, made in zip(methods, maps, strict=True)
    ]


class SharedPass:
    """Methods with the same model and layers, which are explained by the same passes, with the bits of single calls.

    Operations may choose another kernel if a gradient is recorded (attention does). So methods that differentiate and
    those that do not share a pass only if both kinds of passes give the same bits, which the first batch of each shape
    shows.
    """

    def __init__(self, methods: Sequence[OnePass]) -> None:
        self.methods = methods
        self._equal: dict[tuple[object, ...], bool] = {}  # both kinds of passes, by the shape of a batch

    def explain(
        self, x_BCHW: Tensor, target_B: Tensor | None, seed_B: Tensor | None, number: int
    ) -> list[list[tuple[Maps, Last]]]:
        """Return the results of `explain` of each method; of a class-agnostic one, only those of the first target."""
        results: dict[OnePass, list[tuple[Maps, Last]]] = {}
        for methods in self._groups(x_BCHW):
            with methods[0].call(x_BCHW, target_B, seed_B) as given_BCHW:
                computed = compute_together(methods, given_BCHW, target_B, number)
            for method, (maps, logits_BK, found) in zip(methods, computed, strict=True):
                count = number if method.needs_target else 1
                results[method] = method.finish(maps[:count], logits_BK, found[:count])
        return [results[method] for method in self.methods]

    def _groups(self, x_BCHW: Tensor) -> list[list[OnePass]]:
        """Return the methods that share a pass."""
        both = [[method for method in self.methods if method.differentiates is kind] for kind in (True, False)]
        if not all(both) or self._passes_equal(x_BCHW):
            return [list(self.methods)]
        return both

    def _passes_equal(self, x_BCHW: Tensor) -> bool:
        key = (*x_BCHW.shape, x_BCHW.dtype, torch.is_autocast_enabled(x_BCHW.device.type))
        if key not in self._equal:
            with self.methods[0].call(x_BCHW, None, None) as given_BCHW:
                passes = [self.methods[0].taps.forward(given_BCHW, differentiable=kind) for kind in (True, False)]
            (one_BK, ones), (other_BK, others) = passes
            pairs = zip([one_BK, *ones], [other_BK, *others], strict=True)
            self._equal[key] = all(_same_bits(one.detach(), other.detach()) for one, other in pairs)
        return self._equal[key]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_form = one.shape == other.shape and one.dtype == other.dtype
    return same_form and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
