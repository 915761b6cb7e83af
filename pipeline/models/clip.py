"""Models of open_clip: image and text towers, with their weights and preprocessing."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from saltern.pipeline.models import presets
from saltern.pipeline.models.presets import Preset
from saltern.pipeline.naming import brief, install_hint, nearest
from saltern.schemas.errors import UserError
from saltern.schemas.sizes import Side

PREFIX = "open_clip:"
_SCHEMAS = ("local-dir:", "hf-hub:")  # of open_clip: a folder, or a repository that is downloaded


def load(name: str, weights: str, side: Side | None) -> tuple[nn.Module, Preset]:
    """Return a model of open_clip, with its tokenizer as `tokenizer`, and the preset of its weights.

    Args:
        name: as open_clip takes it: a name, local-dir:FOLDER or hf-hub:REPOSITORY.
        weights: a tag of open_clip; DEFAULT = the only one, or those of the folder or repository; none = random.
        side: of the input, pixels; None = that of the weights. Position embeddings are resized to it.

    Raises:
        UserError: the model or tag is unknown, a package is missing, or a download fails.
    """
    try:
        library = importlib.import_module("open_clip")
    except ImportError:
        raise UserError(f"{PREFIX}{name} needs open_clip: {install_hint('clip')}") from None
    tag = _tag(library, name, weights)
    with _one_line(f"{PREFIX}{name}"):
        usual = library.get_model_config(name)["vision_cfg"].get("image_size", 224)
        listed = library.get_pretrained_cfg(name, tag) if tag else {}
        model: Any = library.create_model(
            name,
            pretrained=tag,
            load_weights=weights != "none",
            pretrained_text=False,
            force_quick_gelu=bool(listed.get("quick_gelu", False)),
            force_image_size=None if side in (None, usual) else side,
            require_pretrained=weights != "none",
            weights_only=True,
        )
        model.tokenizer = library.get_tokenizer(name)
    return model, presets.of_open_clip(model.visual.preprocess_cfg)


def _tag(library: Any, name: str, weights: str) -> str | None:
    """Return the tag of pretrained weights, None if open_clip takes none. Raises UserError if there is no such one."""
    if name.startswith(_SCHEMAS):
        if weights not in ("DEFAULT", "none"):
            raise UserError(f"weights {weights!r} of {PREFIX}{name} must be DEFAULT, none or a file")
        return None
    known = library.list_models()
    if name not in known:
        raise UserError(f"open_clip has no model {name!r}; {nearest(name, known)}see open_clip.list_models()")
    tags = library.list_pretrained_tags_by_model(name)
    if weights == "none":
        return None
    if weights == "DEFAULT" and len(tags) == 1:
        return str(tags[0])
    if weights not in tags:
        reason = "has several weights" if weights == "DEFAULT" and tags else f"has no weights {weights!r}"
        raise UserError(f"{PREFIX}{name} {reason}: give --weights {', '.join([*tags, 'none'])} or a file")
    return weights


def converted(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict of both towers, of any release that open_clip knows, as the model's own."""
    towers, convert = importlib.import_module("open_clip.model"), importlib.import_module("open_clip.convert")
    with _one_line("the weights"):
        state = convert.convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = towers.convert_to_custom_text_state_dict(state)
        towers.resize_pos_embed(state, model)
        towers.resize_text_pos_embed(state, model)
        state |= _positions_of_timm(model, state)
    # Text towers of older releases of transformers have a table of positions.
    return {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")}


def _positions_of_timm(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return the position embeddings of an image tower of timm for its grid, which may be another than the file's."""
    key, trunk = "visual.trunk.pos_embed", getattr(model.visual, "trunk", None)
    own = getattr(trunk, "pos_embed", None)
    if trunk is None or own is None or key not in state or state[key].shape == own.shape:
        return {}
    prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
    resample = importlib.import_module("timm.layers").resample_abs_pos_embed
    return {key: resample(state[key], list(trunk.patch_embed.grid_size), num_prefix_tokens=prefix)}


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Raise the errors of open_clip, and its warning of a wrong activation, as a UserError; silence its log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "QuickGELU mismatch", UserWarning)
            yield
    except UserError:
        raise
    except Exception as error:  # of open_clip, timm, transformers or the hub; of any type
        kind = type(error).__name__
        raise UserError(
            f"cannot load {what} ({kind}: {brief(error)}); offline, give files: open_clip:local-dir:FOLDER, or "
            "--weights FILE"
        ) from error
    finally:
        logging.disable(before)
