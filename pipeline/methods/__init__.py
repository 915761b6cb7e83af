"""Saliency methods by name: `build` one, call it on batches."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from saltern.pipeline.methods import casm  # noqa: F401  (registers itself)
from saltern.pipeline.methods.base import METHODS, Last, Method
from saltern.pipeline.methods.cams import activation, cameras, scored  # noqa: F401  (registers itself)
from saltern.pipeline.methods.captum_adapter import adapt
from saltern.pipeline.methods.gradients import gradient, occlusion, paths, rectified  # noqa: F401  (registers itself)
from saltern.pipeline.methods.relevance import lrp  # noqa: F401  (registers itself)
from saltern.pipeline.naming import import_object, nearest
from saltern.schemas.errors import UserError

__all__ = ["Last", "Method", "available", "build", "find"]


def available() -> Mapping[str, type[Method]]:
    """The methods in the registry, by name; `summary()` and `defaults()` of each describe it."""
    return MappingProxyType(dict(sorted(METHODS.items())))


def find(name: str) -> type[Method]:
    """The class of a method: a name in the registry, `captum:NAME` or `package.module:Class`. Raises UserError."""
    if name.startswith("captum:"):
        return adapt(name.removeprefix("captum:"))
    if ":" in name:
        kind = import_object(name)
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise UserError(f"{name!r} is no subclass of saltern.pipeline.methods.Method")
        return kind
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UserError(
            f"unknown method {name!r}; {nearest(name, METHODS)}known: {known}, captum:NAME, package.module:Class"
        )
    return METHODS[name]


def build(name: str, model: nn.Module, *, layer: str | Sequence[str] | None = None, **options: Any) -> Method:
    """A method ready to be called on batches; also a context manager.

    Args:
        name: as `find` takes it.
        model: gives logits (B, K), on its device; left as it is found.
        layer: target layer by dotted name; several where the method allows it; None = the model's default.
        options: of the method; strings stand for other types as JSON does.

    Raises:
        UserError: an unknown method, layer or option, or a model that the method cannot explain.
    """
    return find(name)(model, layer=layer, **options)
