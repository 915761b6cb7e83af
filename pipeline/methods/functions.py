"""Activation functions of torch, and how to read a call of one."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def functions(names: str) -> frozenset[Any]:
    """Return the functions of these names in torch, torch.Tensor and torch.nn.functional."""
    spaces = (torch, torch.Tensor, F)
    return frozenset(getattr(space, name) for name in names.split() for space in spaces if hasattr(space, name))


RECTIFIERS = functions("relu relu_ relu6")
CLAMPS = functions("hardtanh hardtanh_ clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_")
OTHER_ACTIVATIONS = functions(
    "celu celu_ elu elu_ gelu hardswish leaky_relu leaky_relu_ mish prelu rrelu rrelu_ selu selu_ silu softplus"
)
_MODULE_NAMES = {name.lower(): name for name in nn.modules.activation.__all__}
_BOUNDS = {"relu": (0, math.inf), "relu6": (0, 6), "hardtanh": (-1, 1)}  # defaults; clamps have none


def activation_name(function: Any) -> str:
    """Return the name of an activation's module: F.leaky_relu_ -> LeakyReLU."""
    return _MODULE_NAMES[function.__name__.replace("_", "")]


def bounds(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return (low, high) of a rectifier or clamp, None for a bound that it lacks; args follow the input."""
    name = function.__name__.rstrip("_")
    low, high = _BOUNDS.get(name, (None, None))
    positional = [None, *args] if name == "clamp_max" else [value for value in args if not isinstance(value, bool)]
    low = kwargs.get("min_val", kwargs.get("min", positional[0] if positional else low))
    high = kwargs.get("max_val", kwargs.get("max", positional[1] if len(positional) > 1 else high))
    return low, high


def works_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call overwrites its input."""
    name = function.__name__
    by_name = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return by_name or bool(kwargs.get("inplace")) or (bool(args) and args[-1] is True)
