"""A model from one layer on: run again and again with other outputs of that layer, and nothing before it.

What runs after the layer is found by tracing the model once (torch.fx). Only modules that hold the layer are traced
through; all others are single steps, so that what they do inside does not matter. A trace is compared with the model on
the first batch of every shape; where it fails or differs, whole forward passes run instead, with the output replaced.

Shape suffixes: B batch, C H W the network's input, K classes, N changed outputs, each of one of the B samples.
"""
# ruff: noqa: N815  (fields carry a shape suffix)

import inspect
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from saltern.pipeline.models.passes import logits_of
from saltern.pipeline.models.taps import Taps, tensor_of, with_tensor

Values = dict[fx.Node, Any]


class Begun(NamedTuple):
    """A forward pass that can be continued from the layer on."""

    logits_BK: Tensor
    output: Tensor  # of the layer
    again: Callable[[Tensor, Tensor], Tensor]  # (changed output of N, int64 index of their samples): logits_NK


class Tail:
    """What a model computes from a layer on.

    Args:
        model: in eval mode, without gradients, also when called.
        name: dotted name of the layer; of a module that runs several times a pass, its last run counts.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.taps = Taps(model, [name])
        self._model = model
        self._modules = dict(model.named_modules())
        self._steps = _trace(model, self._modules[name])
        self._checked: set[tuple[torch.Size, torch.dtype, bool]] = set()

    @property
    def traced(self) -> bool:
        """False: every pass is a whole one."""
        return self._steps is not None

    def begin(self, x_BCHW: Tensor) -> Begun:
        """A forward pass. Changed outputs may be altered in place by what follows the layer.

        Under autocast, the passes that continue it are in the parameters' own precision: small differences of logits
        are what they are run for.

        Raises:
            UserError: as `Taps.forward` does.
        """
        shape = (x_BCHW.shape, x_BCHW.dtype, torch.is_autocast_enabled(x_BCHW.device.type))
        if self._steps is None:
            return self._whole(x_BCHW)
        if shape in self._checked:
            return self._run(x_BCHW, self._steps)
        whole = self._whole(x_BCHW)
        try:
            begun = self._run(x_BCHW, self._steps)
            same = _agree(begun, whole)
        except Exception:  # whatever a trace may stumble over: the model itself ran
            same = False
        if not same:
            self._steps = None
            return whole
        self._checked.add(shape)
        return begun

    def _whole(self, x_BCHW: Tensor) -> Begun:
        logits_BK, (output,) = self.taps.forward(x_BCHW)
        recast = self._recast(x_BCHW.device)

        def again(changed: Tensor, sample_N: Tensor) -> Tensor:
            with torch.autocast(x_BCHW.device.type, enabled=False):
                return self.taps.replaced(recast(x_BCHW.index_select(0, sample_N)), recast(changed))

        return Begun(logits_BK, output, again)

    def _run(self, x_BCHW: Tensor, steps: "_Steps") -> Begun:
        values = self._before(x_BCHW, steps)
        given = values[steps.layer]
        output = tensor_of(given, self.taps.names[0])
        after, kept = _plan(values, steps)
        recast = self._recast(x_BCHW.device)

        def rest(changed: Tensor, sample_N: Tensor, recast: Callable[[Tensor], Tensor]) -> Tensor:
            def take(tensor: Tensor) -> Tensor:
                # A copy, as what runs from here on may work in place.
                return recast(tensor.index_select(0, sample_N)) if len(tensor) == len(x_BCHW) else tensor

            now = {node: _map(value, take) if node in steps.varying else value for node, value in kept.items()}
            now[steps.layer] = recast(changed) if given is output else with_tensor(_map(given, take), recast(changed))
            for node in after:
                now[node] = self._evaluate(node, now)
            return logits_of(now[steps.output])

        def again(changed: Tensor, sample_N: Tensor) -> Tensor:
            with torch.autocast(x_BCHW.device.type, enabled=False):
                return rest(changed, sample_N, recast)

        every_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
        return Begun(rest(output.clone(), every_B, lambda tensor: tensor), output, again)

    def _before(self, x_BCHW: Tensor, steps: "_Steps") -> Values:
        """Values of all that does not depend on the layer's output, and that output, as far as `_plan` wants them."""
        values: Values = {}
        for node in steps.before:
            if node.op == "placeholder":
                values[node] = steps.defaults.get(node, x_BCHW)
            else:
                values[node] = self._evaluate(node, values)
            for spent in steps.spent[node]:
                if not any(user in values and not _tensors(values[user]) for user in spent.users):
                    del values[spent]
        return values

    def _evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            return self._modules[target](*args, **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return attrgetter(target)(self._model) if node.op == "get_attr" else args[0]

    def _recast(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        weight = next(self._model.parameters(), None)
        if weight is None or not torch.is_autocast_enabled(device.type):
            return lambda tensor: tensor
        return lambda tensor: tensor.to(weight.dtype) if tensor.is_floating_point() else tensor


class _Steps(NamedTuple):
    """A traced model, cut at a layer."""

    layer: fx.Node
    output: fx.Node
    before: list[fx.Node]  # all that does not depend on the layer's output, and the layer; in order
    after: list[fx.Node]  # all that does; in order
    varying: set[fx.Node]  # of those before: depending on the images
    spent: dict[fx.Node, list[fx.Node]]  # by a node before: what no later one uses, nor any after
    defaults: Values  # of the arguments after the images


class _Tracer(fx.Tracer):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is self._layer or all(part is not self._layer for part in m.modules())


def _trace(model: nn.Module, layer: nn.Module) -> _Steps | None:
    """None where the model cannot be traced."""
    attributes = set(vars(model))
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        fixed = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
        tracer = _Tracer(layer)
        graph = tracer.trace(model, fixed)
    except Exception:  # the model's own code, run on stand-ins for tensors, may raise anything
        return None
    finally:
        # The tracer leaves tensors that were made on the way in the model. They may differ from call to call.
        made = set(vars(model)) - attributes
        for name in made:
            delattr(model, name)
    nodes = list(graph.nodes)
    modules = dict(model.named_modules())
    runs = [node for node in nodes if node.op == "call_module" and modules[str(node.target)] is layer]
    images, *others = (node for node in nodes if node.op == "placeholder")
    if made or not runs or len(others) != len(fixed):
        return None
    return _cut(nodes, images, runs[-1], dict(zip(others, fixed.values(), strict=True)))


def _cut(nodes: list[fx.Node], images: fx.Node, layer: fx.Node, defaults: Values) -> _Steps:
    dependent, varying = {layer}, {images}
    for node in nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
        elif not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    after = [node for node in nodes if node in dependent and node is not layer]
    before = [node for node in nodes if node not in dependent or node is layer]
    spent: dict[fx.Node, list[fx.Node]] = {node: [] for node in before}
    for node in before:
        if node is not layer and node.users and not dependent.intersection(node.users).difference({layer}):
            last = max(before.index(user) for user in node.users)
            spent[before[last]].append(node)
    return _Steps(layer, nodes[-1], before, after, varying, spent, defaults)


def _plan(values: Values, steps: _Steps) -> tuple[list[fx.Node], Values]:
    """What to run again for a changed output, in order, and the values that it starts from.

    Sizes of the batch that were read before the layer are read again, from tensors that have been made as many.
    """
    again, kept = set(steps.after), {}
    for node in reversed(steps.before):
        if node is steps.layer or not again.intersection(node.users):
            continue
        if node in steps.varying and not _tensors(values[node]):
            again.add(node)
        else:
            kept[node] = values[node]
    order = [node for node in steps.before if node in again]
    return [*order, *steps.after], kept


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.ndim else value
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    return type(value)(_map(part, change) for part in value) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_tensors(part) for part in value)
    return isinstance(value, Tensor) or (isinstance(value, dict) and _tensors(list(value.values())))


def _agree(begun: Begun, whole: Begun) -> bool:
    """A trace and the model agree on the logits, and on those of another, changed output, at another batch size."""
    sample_N = torch.arange(len(whole.logits_BK) + 1, device=whole.logits_BK.device) % len(whole.logits_BK)
    changed = whole.output.index_select(0, sample_N) / 2
    pairs = (
        (begun.logits_BK, whole.logits_BK),
        (begun.again(changed.clone(), sample_N), whole.again(changed, sample_N)),
    )
    return all(_close(found, expected) for found, expected in pairs)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    # Another batch size rounds otherwise; bfloat16 keeps 8 bits.
    tolerance = 1e-3 if torch.finfo(found.dtype).bits > 16 else 0.05
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
