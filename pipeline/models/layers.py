"""Target layers by dotted name, and the default layer of a model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from saltern.pipeline.models.probe import probe, watched
from saltern.pipeline.models.taps import is_scaled
from saltern.pipeline.naming import nearest
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side

# The layer before global pooling, by torchvision class.
_LAST_STAGE = {
    "ConvNeXt": "features",
    "DenseNet": "features",  # before the functional ReLU
    "EfficientNet": "features",
    "GoogLeNet": "inception5b",
    "Inception3": "Mixed_7c",
    "MNASNet": "layers",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "RegNet": "trunk_output",
    "ResNet": "layer4",
    "ShuffleNetV2": "conv5",
    "SqueezeNet": "features",
    "SwinTransformer": "norm",
}


def resolve(model: nn.Module, layer: str | Sequence[str] | None, side: Side | None = None) -> list[str]:
    """Return the checked dotted names of target layers; the model's default if none is given. Raises UserError."""
    names = [layer] if isinstance(layer, str) else list(layer or ())
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            parts = ", ".join(child for child, _ in model.named_children())
            hint = nearest(name, known)
            raise UserError(f"{_kind(model)} has no layer {name!r}; {hint}its layers: {parts}, and their parts (a.b)")
    if len(set(names)) < len(names):
        raise UserError(f"a layer is given twice: {', '.join(names)}")
    return names or [default_layer(model, side)]


def default_layer(model: nn.Module, side: Side | None = None) -> str:
    """Return the last layer with a grid: the output of the last stage, before global pooling.

    VGG and AlexNet: the last activation before the last max pooling (14 x 14 and 13 x 13 at 224), as in the paper on
    Grad-CAM. Transformers on tokens: the first norm of the last block, because the patches do not reach the logits
    after it if those come from a class token. A model that is not from torchvision is run once, on images of `side`
    pixels, to find it. Raises UserError if it has none.
    """
    family = next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("torchvision.models")), ""
    )
    known: dict[str, nn.Module] = dict(model.named_modules())
    if family in ("VGG", "AlexNet"):
        return [name for name in known if name.startswith("features.")][-2]
    if family == "VisionTransformer":
        return _last_first_norm(model, known)
    if family == "MaxVit":
        return [name for name in known if name.startswith("blocks.") and name.count(".") == 1][-1]
    return _LAST_STAGE[family] if family in _LAST_STAGE else _last_grid(model, known, side)


def _last_first_norm(model: nn.Module, known: dict[str, nn.Module]) -> str:
    norms = [name for name in known if name.endswith((".ln_1", ".norm1", ".layernorm_before"))]
    if not norms:
        raise UserError(
            f"{_kind(model)} works on tokens; name the target layer (layer=), such as the last block's first norm"
        )
    return norms[-1]


def _last_grid(model: nn.Module, known: dict[str, nn.Module], side: Side | None) -> str:
    grids: list[tuple[str, int]] = []  # name and number of dimensions
    x_BCHW = probe(model, side)
    image = x_BCHW.shape[2:]

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim not in (3, 4) or min(output.shape[1:]) == 1:
                return
            # Four dimensions inside of an attention (heads, tokens, channels) are no grid.
            if output.ndim == 3 or any(is_scaled(output.shape[at : at + 2], image) for at in (1, 2)):
                grids.append((name, output.ndim))

        return hook

    watched(model, x_BCHW, {module: note(name) for name, module in known.items() if name})
    if not grids:
        raise UserError(f"{_kind(model)} has no layer with a grid (N, K, h, w); name the target layer (layer=)")
    name, dimensions = grids[-1]
    return name if dimensions == 4 else _last_first_norm(model, known)


def _kind(model: nn.Module) -> str:
    return type(model).__name__
