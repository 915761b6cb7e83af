"""Read state dicts from files, load them into a model, and compute their digest."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from saltern.pipeline.naming import brief
from saltern.schemas.errors import UserError, printable

SUFFIXES = (".pth", ".pt", ".safetensors")
_LFS = b"version https://git-lfs"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PLAIN = "; save dense floating weights: quantised, sparse or integer ones cannot be explained"
# Checkpoints of DenseNet from before torchvision 0.4 have a dot that module names no longer allow.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def read(path: Path) -> dict[str, Any]:
    """Return the state dict of a .pth, .pt or .safetensors file, on the CPU, without wrapper and `module.` prefixes.

    Never runs code from the file. Raises UserError if it is missing, damaged or holds no state dict.
    """
    name = printable(str(path))
    if not path.is_file():
        raise UserError(f"no weights file {name!r}")
    try:
        content = _load(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{name} is damaged, or contains code, which is never run; save it as .safetensors") from error
    except Exception as error:  # the parsers of a damaged file raise errors of any type
        reason = printable(brief(error))
        raise UserError(f"{name} is no readable weights file: {reason} ({type(error).__name__})") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{name} holds no state dict; save the model's state_dict()")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise UserError(f"{name} has the key {printable(repr(odd[0]))}, and keys must be names; save state_dict()")
    return _plain_keys(content)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        begins = file.read(len(_LFS))
    if begins == _LFS:
        raise UserError(f"{printable(str(path))} is a pointer of Git LFS and not the file: run git lfs pull")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.rpartition("/")[2] == "constants.pkl" for member in archive.namelist()):
                raise UserError(
                    f"{printable(str(path))} is TorchScript; save its weights: "
                    "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own storages
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
    state = _without_prefix(state, own)
    state_keys = [key for key in state if key in own or not key.startswith(optional or ("\0",))]
    faults = {
        # Only newer files have counts of batches, and those change nothing in eval mode.
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state_keys if key not in own],
        "of another shape": [key for key in state_keys if key in own and own[key].shape != _shape(state[key])],
        "of another kind": [key for key in state_keys if key in own and not _is_plain(state[key], own[key])],
    }
    messages = [f"{kind}: {_first(keys)}" for kind, keys in faults.items() if keys]
    if messages:
        text = printable(f"{source} does not fit {type(model).__name__}; {'; '.join(messages)}")
        raise UserError(text + (_PLAIN if faults["of another kind"] else ""))
    fitting = OrderedDict((key, state[key]) for key in state_keys)
    # torch converts old layouts by the versions of modules; a file without versions counts as current.
    vars(fitting)["_metadata"] = getattr(state, "_metadata", None) or getattr(own, "_metadata", None)
    model.load_state_dict(fitting, strict=False)


def _without_prefix(state: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state without the prefix of a wrapper (`model.` of Lightning, `_orig_mod.` of torch.compile).

    A prefix is removed only if it is the single one below which all of the model's own keys are; other keys, as of a
    loss, are left out then.
    """
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    if not needed or needed[0] in state:
        return state
    prefixes = [key.removesuffix(needed[0]) for key in state if key.endswith(f".{needed[0]}")]
    fitting = [prefix for prefix in prefixes if all(prefix + key in state for key in needed)]
    if len(fitting) != 1:
        return state
    return {key.removeprefix(fitting[0]): value for key, value in state.items() if key.startswith(fitting[0])}


def _is_plain(value: Any, own: Any) -> bool:
    """Return whether a value can be copied into the model's own without a loss that nobody asked for."""
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return True  # a shape that differs, or no tensor at all: said already
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        return False
    return value.is_floating_point() or not own.is_floating_point()


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
