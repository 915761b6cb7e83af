"""Read state dicts from files, load them into a model, and compute their digest."""

import hashlib
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError

SUFFIXES = (".pth", ".pt", ".safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Checkpoints of DenseNet from before torchvision 0.4 have a dot that module names no longer allow.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def read(path: Path) -> dict[str, Any]:
    """Return the state dict of a .pth, .pt or .safetensors file, on the CPU, without wrapper and `module.` prefixes.

    Never runs code from the file. Raises UserError if it is missing, damaged or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"no weights file {str(path)!r}")
    try:
        content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or contains code, which is never run; save it as .safetensors") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no readable weights file: {brief(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict; save the model's state_dict()")
    return _plain_keys(content)


def _load_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _plain_keys(state: dict[str, Any]) -> dict[str, Any]:
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    plain = OrderedDict((_OLD_DENSENET.sub(r"\1\2", key.removeprefix(prefix)), value) for key, value in state.items())
    if not prefix:
        vars(plain)["_metadata"] = getattr(state, "_metadata", None)
    return plain


def fit(model: nn.Module, state: dict[str, Any], source: str, optional: tuple[str, ...] = ()) -> None:
    """Load a state dict into the model, key by key.

    Args:
        source: the file, for the message.
        optional: prefixes of keys that the model may lack (auxiliary heads).

    Raises:
        UserError: names the first keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state_keys = [key for key in state if key in own or not key.startswith(optional or ("\0",))]
    faults = {
        # Only newer files have counts of batches, and those change nothing in eval mode.
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state_keys if key not in own],
        "of another shape": [key for key in state_keys if key in own and own[key].shape != _shape(state[key])],
    }
    messages = [f"{kind}: {_first(keys)}" for kind, keys in faults.items() if keys]
    if messages:
        raise UserError(f"{source} does not fit {type(model).__name__}; {'; '.join(messages)}")
    fitting = OrderedDict((key, state[key]) for key in state_keys)
    # torch converts old layouts by the versions of modules; a file without versions counts as current.
    vars(fitting)["_metadata"] = getattr(state, "_metadata", None) or getattr(own, "_metadata", None)
    model.load_state_dict(fitting, strict=False)


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _first(keys: list[str], count: int = 3) -> str:
    rest = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + rest


def digest(model: nn.Module) -> str:
    """Return the sha256, hex, of the state dict: name, dtype, shape and bytes of each entry, in the order of names."""
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
