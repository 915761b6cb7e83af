"""What models and layers return: tensors, or dicts, tuples and dataclasses that hold them.

Shape suffixes: B batch, K classes.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saltern.schemas.errors import UserError


def find_logits(output: Any) -> Tensor | None:
    """Return the logits of a model's output, (batch, classes); None if it does not show which tensor they are.

    They are the output itself; or its part `logits` (a key, an attribute, as of transformers' ImageClassifierOutput);
    or the only tensor of two dimensions in a dict, tuple, list or dataclass.
    """
    if isinstance(output, Tensor):
        return output if output.ndim == 2 else None
    parts = _parts(output)
    if "logits" in parts:
        return find_logits(parts["logits"]) if isinstance(parts["logits"], Tensor) else None
    found = [part for part in parts.values() if isinstance(part, Tensor) and part.ndim == 2]
    return found[0] if len(found) == 1 else None


def no_logits(kind: str, output: Any) -> UserError:
    """Return the error about a model's output in which `find_logits` finds nothing."""
    fix = "" if isinstance(output, Tensor) else ", or name one of its tensors 'logits'"
    form = _form_of(output)
    return UserError(f"{kind} must return logits of shape (batch, classes), not {form}; wrap it in a factory{fix}")


def _form_of(output: Any) -> str:
    """Return the shape of a tensor, or the kind and parts of another output, for a message."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    parts = {name: _form_of(part) for name, part in _parts(output).items() if isinstance(part, Tensor)}
    listed = f" of {', '.join(f'{name} {form}' for name, form in parts.items())}" if parts else ""
    return type(output).__name__ + listed


def _parts(output: Any) -> dict[Any, Any]:
    """Return the parts of a container by key, field or position; none of anything else."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        return dict(zip(names, output, strict=True))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {item.name: getattr(output, item.name) for item in dataclasses.fields(output)}
    return {}


def tensor_of(output: Any, name: str) -> Tensor:
    """Return the tensor of a layer's output; of several, the first. Raises UserError if it holds none."""
    tensor = output if isinstance(output, Tensor) else next(iter(_parts(output).values()), None)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise UserError(f"layer {name!r} gives {type(output).__name__}, no tensor; choose another")
    return tensor


def with_tensor(output: Any, replacement: Tensor) -> Any:
    """Return a layer's output with the tensor that `tensor_of` returns replaced."""
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = replacement
        return changed
    if isinstance(output, tuple | list):
        whole = [replacement, *output[1:]]
        return output._make(whole) if hasattr(output, "_make") else type(output)(whole)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: replacement})
    return replacement
