"""Saliency methods by name: `build` one, call it on batches.

`available()` maps names to classes. Each class describes itself: `.summary()` is one line, `.cost` counts its forward
and backward passes for an image, `.option_specs()` lists (name, default, choices or type, help) of its options.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from saltern.pipeline.methods.attention.grad_eclip import GradECLIP
from saltern.pipeline.methods.attention.legrad import LeGrad
from saltern.pipeline.methods.attention.weights import Attention, Chefer, Rollout
from saltern.pipeline.methods.base import Last, Method
from saltern.pipeline.methods.cams.activation import (
    CAM,
    EigenCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from saltern.pipeline.methods.cams.cameras import CAMERAS
from saltern.pipeline.methods.cams.scored import AblationCAM, ScoreCAM
from saltern.pipeline.methods.cams.shapley import ShapleyCAM
from saltern.pipeline.methods.captum_adapter import adapt
from saltern.pipeline.methods.casm import CASM
from saltern.pipeline.methods.gradients.full import FullGrad
from saltern.pipeline.methods.gradients.gradient import Gradient, InputXGradient
from saltern.pipeline.methods.gradients.occlusion import Occlusion
from saltern.pipeline.methods.gradients.paths import IntegratedGradients, SmoothGrad
from saltern.pipeline.methods.gradients.rectified import Deconvnet, GuidedBackprop, GuidedGradCAM
from saltern.pipeline.methods.gradients.rise import RISE
from saltern.pipeline.methods.localizer import LocalizerMap
from saltern.pipeline.methods.options import OptionSpec
from saltern.pipeline.methods.relevance.lrp import CLRP, LRP, SGLRP, RelevanceCAM
from saltern.pipeline.naming import import_object, nearest
from saltern.schemas.errors import UserError
from saltern.schemas.rules import Finer
from saltern.schemas.sizes import Side

__all__ = ["Last", "Method", "OptionSpec", "available", "build", "find"]

_CAMS = (CAM, GradCAM, GradCAMPlusPlus, LayerCAM, HiResCAM, XGradCAM, EigenCAM, ScoreCAM, AblationCAM, CAMERAS)
_GRADIENTS = (Gradient, InputXGradient, SmoothGrad, IntegratedGradients, Deconvnet, GuidedBackprop, GuidedGradCAM)
_ATTENTION = (Attention, Rollout, Chefer, LeGrad, GradECLIP)
_CLASSES: tuple[type[Method], ...] = (
    *_CAMS,
    *_ATTENTION,
    *_GRADIENTS,
    ShapleyCAM,
    FullGrad,
    Occlusion,
    RISE,
    LRP,
    CLRP,
    SGLRP,
    RelevanceCAM,
    CASM,
    LocalizerMap,
)
_METHODS = {kind.name: kind for kind in sorted(_CLASSES, key=lambda kind: kind.name)}


def available() -> Mapping[str, type[Method]]:
    """Return the built-in methods by name, in alphabetical order."""
    return MappingProxyType(_METHODS)


def find(name: str) -> type[Method]:
    """Return the class of a method: a built-in name, `captum:NAME` or `package.module:Class`. Raises UserError."""
    if name.startswith("captum:"):
        return adapt(name.removeprefix("captum:"))
    if ":" in name:
        kind = import_object(name)
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise UserError(f"{name!r} is no subclass of saltern.pipeline.methods.Method")
        return kind
    if name not in _METHODS:
        hint, known = nearest(name, _METHODS), ", ".join(_METHODS)
        raise UserError(f"unknown method {name!r}; {hint}known: {known}, captum:NAME, package.module:Class")
    return _METHODS[name]


def build(
    name: str,
    model: nn.Module,
    *,
    layer: str | Sequence[str] | None = None,
    input_side: Side | None = None,
    finer: Finer | None = None,
    **options: Any,
) -> Method:
    """Return a method that is ready for batches; it is also a context manager.

    Args:
        name: as for `find`.
        model: returns logits (B, K), on its device; left as it was.
        layer: target layer by dotted name; several if the method allows it; None = the model's default.
        input_side: pixels of the images to come, or height and width; None = the model's `image_size`, or 224.
        finer: compare each class with similar ones; None = explain its logit by itself.
        options: of the method; texts are read as JSON.

    Raises:
        UserError: an unknown method, layer or option, or a model that the method cannot explain.
    """
    return find(name)(model, layer=layer, input_side=input_side, finer=finer, **options)
