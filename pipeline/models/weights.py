"""State dicts from files, fitted to a model; and the digest that weights are known by."""

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
# Checkpoints of DenseNet from before torchvision 0.4: a dot that module names no longer allow.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def read(path: Path) -> dict[str, Any]:
    """The state dict in a .pth, .pt or .safetensors file, on the CPU, without wrapper and `module.` prefixes.

    Never runs code from the file. Raises UserError where it is missing, damaged or holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"no weights file {str(path)!r}")
    try:
        held = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or needs code of its own to be run, which is refused; save it as .safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no readable weights file: {brief(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict) or not any(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{path} holds no state dict; save the model's state_dict()")
    return _plain_keys(held)


def _load_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _plain_keys(held: dict[str, Any]) -> dict[str, Any]:
    prefix = "module." if all(key.startswith("module.") for key in held) else ""
    plain = OrderedDict((_OLD_DENSENET.sub(r"\1\2", key.removeprefix(prefix)), value) for key, value in held.items())
    if not prefix:
        vars(plain)["_metadata"] = getattr(held, "_metadata", None)
    return plain


def fit(model: nn.Module, state: dict[str, Any], source: str, optional: tuple[str, ...] = ()) -> None:
    """Load a state dict into the model, key by key.

    Args:
        source: the file, for the message.
        optional: prefixes of keys that the file may hold and the model lacks (auxiliary heads).

    Raises:
        UserError: names the first keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state_keys = [key for key in state if key in own or not key.startswith(optional or ("\0",))]
    faults = {
        # Counts of batches stand in newer files only, and change nothing in eval mode.
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state_keys if key not in own],
        "of another shape": [key for key in state_keys if key in own and own[key].shape != _shape(state[key])],
    }
    said = [f"{kind}: {_first(keys)}" for kind, keys in faults.items() if keys]
    if said:
        raise UserError(f"{source} does not fit {type(model).__name__}; {'; '.join(said)}")
    fitting = OrderedDict((key, state[key]) for key in state_keys)
    # Versions of modules decide on old layouts; a file without them is taken as of today.
    vars(fitting)["_metadata"] = getattr(state, "_metadata", None) or getattr(own, "_metadata", None)
    model.load_state_dict(fitting, strict=False)


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _first(keys: list[str], count: int = 3) -> str:
    rest = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + rest


def digest(model: nn.Module) -> str:
    """sha256, hex, over the state dict: name, dtype, shape and bytes of each entry, in the order of names."""
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
