"""Forward passes with changed outputs of one layer, in which the modules before the layer are not computed again.

The first pass of a batch records what each outermost module before the layer returned. In further passes these modules
return their records, so that only the layer's successors and the functions between modules are computed. `vmap` runs
several changed outputs in one pass; values that do not depend on them are computed once.

Shape suffixes: B batch, C H W the network's input, K classes, N changed outputs.
"""

import logging
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from saltern.pipeline.device import device_lost, out_of_memory
from saltern.pipeline.models.halves import full_of, full_weights
from saltern.pipeline.models.interception import replaced
from saltern.pipeline.models.outputs import tensor_of, with_tensor
from saltern.pipeline.models.passes import full_precision, logits_of
from saltern.schemas.errors import UserError

_log = logging.getLogger(__name__)
_COMPUTE = object()  # a record that makes the module compute


class Tail:
    """The part of a model from one layer on.

    Args:
        model: in eval mode, without gradients, also when called.
        name: dotted name of the layer; of a module that runs several times a pass, the last run counts.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.layer = model.get_submodule(name)
        self.modules = list(dict.fromkeys(_outermost(model, self.layer)))
        self.whole = False  # True once records failed to give the model's logits: then all modules compute
        self.batched = True  # False once vmap failed: then each changed output has its own pass
        self._checked = False

    def record(self, x_BCHW: Tensor) -> "Recording":
        """Run the model on a batch. Raises UserError if the layer does not run, or returns no tensor."""
        return Recording(self, x_BCHW)

    def each(self, function: Callable[[Tensor], Tensor], values_N: Tensor) -> Tensor:
        """Return `function` (a value -> B numbers) of each value, (B, N); in one pass if vmap supports the model."""
        if self.batched:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of operations that vmap runs one by one
                    result_BN = torch.vmap(function, out_dims=1)(values_N)
                self._checked = self._checked or _close(result_BN[:, :1], function(values_N[0])[:, None])
                if self._checked:
                    return result_BN
            except Exception as error:  # an error of the model itself comes again below
                if device_lost(error) or out_of_memory(error):
                    raise
                _log.debug("vmap cannot run %s: %s", type(self.model).__name__, error)
            self.batched = False
        return torch.stack([function(value) for value in values_N], 1)


class Recording:
    """A forward pass of a batch that can be repeated with other outputs of the layer.

    Under autocast, repeated passes use the precision of the parameters: the differences between them are small.
    """

    def __init__(self, tail: Tail, x_BCHW: Tensor) -> None:
        self._tail, self._x_BCHW = tail, x_BCHW.clone()
        weight = full_of(next(tail.model.parameters(), None))
        autocast = weight is not None and torch.is_autocast_enabled(x_BCHW.device.type)
        self._dtype = weight.dtype if weight is not None and autocast else None
        calls, self.logits_BK = self._record(x_BCHW)
        self.output = tensor_of(calls[-1][1], tail.name)  # of the layer
        self._modules = [module for module, _ in calls]
        self._records = [self._cast(record) for _, record in calls]
        self._fragile: set[int] = set()  # records that a function changes in place
        self.baseline_BK = self._baseline()  # logits of a repeated pass with the layer's own output

    def logits(self, output: Tensor) -> Tensor:
        """Return logits_BK of a pass in which the layer returns another output, which may be overwritten."""
        output = self._cast(output)
        zero = torch.zeros_like(output[(0,) * output.ndim])
        # The sum is a copy, and part of vmap's batch if the output is: otherwise it could not be changed in place.
        records = [
            tree_map_only(Tensor, lambda part: part + zero, record) if index in self._fragile else record
            for index, record in enumerate(self._records)
        ]
        records[-1] = with_tensor(records[-1], output)
        return self._repeat(records)

    def _record(self, x_BCHW: Tensor) -> tuple[list[tuple[nn.Module, Any]], Tensor]:
        """Return each outermost module that ran up to the layer, with a copy of its output; and logits_BK."""
        calls: list[tuple[nn.Module, Any]] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            calls.append((module, tree_map_only(Tensor, Tensor.clone, output)))

        handles = [module.register_forward_hook(keep) for module in self._tail.modules]
        try:
            logits_BK = logits_of(self._tail.model(x_BCHW))
        finally:
            for handle in handles:
                handle.remove()
        runs = [index for index, (module, _) in enumerate(calls) if module is self._tail.layer]
        if not runs:
            raise UserError(f"layer {self._tail.name!r} does not run in the forward pass; choose another")
        return calls[: runs[-1] + 1], logits_BK

    def _baseline(self) -> Tensor:
        """Repeat the pass unchanged; on another result than the recorded one, let all modules compute."""
        if not self._tail.whole:
            copies = tree_map_only(Tensor, Tensor.clone, self._records)
            try:
                baseline_BK = self._repeat(copies)
                if _close(baseline_BK, self.logits_BK):
                    self._fragile = {index for index, copy in enumerate(copies) if _is_changed(copy)}
                    if isinstance(copies[-1], Tensor):
                        self._fragile.discard(len(copies) - 1)  # always replaced
                    return baseline_BK
            except Exception as error:  # the model's own code may raise anything on records
                if device_lost(error) or out_of_memory(error):
                    raise
                _log.debug("%s does not run on records: %s", type(self._tail.model).__name__, error)
            self._tail.whole = True
        runs = [index for index, module in enumerate(self._modules) if module is self._tail.layer]
        self._modules = [self._tail.layer] * len(runs)
        self._records = [*(_COMPUTE for _ in runs[:-1]), self._records[-1]]
        return self.logits(self.output.clone())

    def _repeat(self, records: Sequence[Any]) -> Tensor:
        with full_precision(self._x_BCHW.device), full_weights(self._tail.model), _returning(self._modules, records):
            return logits_of(self._tail.model(self._cast(self._x_BCHW.clone())))

    def _cast(self, value: Any) -> Any:
        return tree_map_only(Tensor, self._cast_tensor, value) if self._dtype is not None else value

    def _cast_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _returning(modules: Sequence[nn.Module], records: Sequence[Any]) -> Iterator[None]:
    """While entered, each module returns its records in turn, then computes again."""
    queues: dict[nn.Module, deque[Any]] = defaultdict(deque)
    for module, record in zip(modules, records, strict=True):
        queues[module].append(record)
    with replaced({module: _replaying(queue, module.forward) for module, queue in queues.items()}):
        yield


def _replaying(queue: deque[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        record = queue.popleft() if queue else _COMPUTE
        return forward(*args, **kwargs) if record is _COMPUTE else record

    return call


def _outermost(parent: nn.Module, layer: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that do not hold the layer, and the layer."""
    for child in parent.children():
        if child is layer or all(part is not layer for part in child.modules()):
            yield child
        else:
            yield from _outermost(child, layer)


def _is_changed(copy: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf._version > 0 for leaf in tree_leaves(copy))


def _close(logits_BK: Tensor, expected_BK: Tensor) -> bool:
    if logits_BK.shape != expected_BK.shape:
        return False
    tolerance = 1e-3 if torch.finfo(expected_BK.dtype).bits > 16 else 0.05  # bfloat16 keeps 8 bits
    scale = float(expected_BK.nan_to_num(0, 0, 0).abs().max())
    logits_BK = logits_BK.to(expected_BK.dtype)
    return torch.allclose(logits_BK, expected_BK, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
