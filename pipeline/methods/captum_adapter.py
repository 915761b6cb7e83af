"""Any attribution of captum as a method: `captum:IntegratedGradients`.

Shape suffixes: B batch, C H W the network's input, K classes.
"""

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from saltern.pipeline.methods.base import Maps, Method
from saltern.pipeline.methods.options import OptionSpec, from_text
from saltern.pipeline.models.passes import logits_of, pick_target
from saltern.pipeline.models.taps import Taps
from saltern.pipeline.naming import install_hint, nearest
from saltern.schemas.config import check_keys
from saltern.schemas.errors import UserError

_OURS = ("self", "inputs", "target", "additional_forward_args", "kwargs")  # of attribute(); the others are options
_REQUIRED = "Required."


class Captum(Method):
    """Base of the adapted attributions: captum's attribution summed over channels."""

    cost = "that of captum, and 1 forward"

    attribution: ClassVar[Any]  # captum's class

    @classmethod
    def option_specs(cls) -> list[OptionSpec]:
        parameters = inspect.signature(cls.attribution.attribute).parameters.values()
        return [
            OptionSpec(
                p.name, None if p.default is p.empty else p.default, "JSON", _REQUIRED if p.default is p.empty else ""
            )
            for p in parameters
            if p.name not in _OURS
        ]

    @classmethod
    def complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        defaults = cls.defaults()
        check_keys(given, defaults, f"the options of {cls.title()}")
        for spec in cls.option_specs():
            if spec.help == _REQUIRED and spec.name not in given:
                raise UserError(f"{cls.title()} needs the option {spec.name!r}: -O {spec.name}=VALUE, JSON")
        return defaults | {name: from_text(value) for name, value in given.items()}

    def prepare(self) -> None:
        self._taps = Taps(self.model, self.layer)
        modules = [self.model.get_submodule(name) for name in self.layer]
        self._attribution = self.attribution(self.model, *modules)
        # captum expects tuples; JSON has lists.
        self._kwargs = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.options.items()
            if value is not None
        }

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Maps, Tensor, Tensor | None]:
        with torch.no_grad():
            logits_BK = logits_of(self.model(x_BCHW))
        target_B = pick_target(logits_BK, target_B)
        target = {"target": target_B} if self.needs_target else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # captum warns about the hooks that it sets
            attributions = self._attribution.attribute(x_BCHW.requires_grad_(), **target, **self._kwargs)
        if not isinstance(attributions, Tensor):
            kind = type(attributions).__name__
            raise UserError(f"{self.title()} returns {kind}, no map; leave out the options that add to it")
        on_pixels = self.heavy_tailed
        values_BKhw = attributions.float() if on_pixels else self._taps.grid(0, attributions, x_BCHW.shape[2:])
        return values_BKhw.sum(1), logits_BK, target_B if self.needs_target else None


def adapt(name: str) -> type[Captum]:
    """Return the method for an attribution class of captum. Raises UserError if it is none, or captum is missing."""
    try:
        import captum.attr
    except ImportError:
        raise UserError(f"captum:{name} needs captum: {install_hint('captum')}") from None
    classes = {key: kind for key, kind in vars(captum.attr).items() if _is_usable(kind, captum.attr.Attribution)}
    if name not in classes:
        raise UserError(f"unknown method 'captum:{name}'; {nearest(name, classes)}known: {', '.join(sorted(classes))}")
    on_pixels = not issubclass(classes[name], captum.attr.LayerAttribution)
    traits = {
        "needs_target": "target" in inspect.signature(classes[name].attribute).parameters,
        "layered": "layer" in inspect.signature(classes[name]).parameters,
        "heavy_tailed": on_pixels,
        "default_map_dtype": "uint8" if on_pixels else "float32",
    }
    doc = f"captum's {name}, summed over channels."
    return type(name, (Captum,), {"name": f"captum:{name}", "attribution": classes[name], "__doc__": doc, **traits})


def _is_usable(kind: Any, base: type) -> bool:
    # Constructed from a model, or a model and a layer; without a neuron to choose or another attribution inside.
    if not (isinstance(kind, type) and issubclass(kind, base) and "attribute" in vars(kind)):
        return False
    if "neuron_selector" in inspect.signature(vars(kind)["attribute"]).parameters:
        return False
    needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return needed in (["forward_func"], ["model"], ["forward_func", "layer"], ["model", "layer"])
