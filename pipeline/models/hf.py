"""Image classifiers of transformers, from a local folder or its cache. Nothing is downloaded, and no code is run."""

import importlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from saltern.pipeline.models import presets
from saltern.pipeline.models.presets import Preset
from saltern.pipeline.naming import brief, install_hint
from saltern.schemas.config import Preprocess
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side

PREFIX = "hf:"
_RESIZES = "interpolate_pos_encoding"  # argument of transformers' models that take images of other sizes
_UNKNOWN = "there is no preprocessor_config.json; without --mean and --std, ImageNet's are used"
_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load(name: str, weights: str, side: Side | None) -> tuple[nn.Module, Preset, list[str] | None]:
    """Return an image classifier, the preset of its image processor, and the names of its classes if it has any.

    Args:
        name: a folder with config.json, or ORG/NAME in the cache.
        weights: DEFAULT | none, random from the global generator.
        side: of the input, pixels; None = that of the weights. Position embeddings are interpolated to it.

    Raises:
        UserError: transformers is missing, or there is no such model here, or it is no image classifier.
    """
    if os.path.isabs(name) and not os.path.isdir(name):  # transformers would take it for a name of its hub
        raise UserError(f"{PREFIX}{name}: there is no such folder")
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise UserError(f"{PREFIX}{name} needs transformers: {install_hint('hf')}") from None
    with _one_line(library, name):
        config = library.AutoConfig.from_pretrained(name, **_OFFLINE)
        auto = library.AutoModelForImageClassification
        if type(config) not in auto._model_mapping:
            raise UserError(f"{PREFIX}{name} is a {config.model_type}, which is no image classifier of transformers")
        if weights == "none":
            model = auto.from_config(config)
        else:
            model, found = auto.from_pretrained(name, output_loading_info=True, dtype="float32", **_OFFLINE)
            if missing := sorted(found["missing_keys"]):
                raise UserError(f"{PREFIX}{name} has no weights for {missing[0]}: give a model with a trained head")
        usual = getattr(config, "image_size", None)
        preset = _preset(library, name, usual)
    if side not in (None, usual) and _RESIZES in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_resizing, with_kwargs=True)
    labels = config.id2label
    names = [labels[number] for number in range(len(labels))] if sorted(labels) == list(range(len(labels))) else []
    return model, preset, None if all(name.startswith("LABEL_") for name in names) else names


def _resizing(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, _RESIZES: True}


def _preset(library: Any, name: str, usual: Any) -> Preset:
    try:
        processor = library.AutoImageProcessor.from_pretrained(name, **_OFFLINE)
    except OSError:
        side = usual if isinstance(usual, int) else Preprocess.crop
        return Preset(Preprocess(crop=side), _UNKNOWN)
    return presets.of_hf(type(processor).__name__, processor.to_dict())


@contextmanager
def _one_line(library: Any, name: str) -> Iterator[None]:
    """Raise the errors of transformers as a UserError, and silence its log and its bars."""
    log = library.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of transformers, of any type
        here = (
            "the folder" if os.path.isdir(name) else "the cache, and nothing is downloaded; fetch it, or give a folder"
        )
        raise UserError(f"cannot load {PREFIX}{name} from {here} ({type(error).__name__}: {brief(error)})") from error
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
