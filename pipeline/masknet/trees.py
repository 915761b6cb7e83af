"""States of nested mappings, lists and tensors as JSON, with the tensors stored separately."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def split(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON tree of a state; its tensors are added to `tensors` under their paths, which start with name."""
    if isinstance(state, Tensor):
        tensors[name] = state.detach().cpu().contiguous().clone()  # cloned, because safetensors allows no shared memory
        return {"tensor": name}
    if isinstance(state, Mapping):  # stored as pairs, because the keys of optimisers are numbers
        return {"map": [[key, split(item, f"{name}/{key}", tensors)] for key, item in state.items()]}
    if isinstance(state, list | tuple):
        items = [split(item, f"{name}/{index}", tensors) for index, item in enumerate(state)]
        return {"tuple" if isinstance(state, tuple) else "list": items}
    return {"value": state}


def join(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Return the state of a JSON tree; `tensor` returns a tensor by its path."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "map":
        return {key: join(item, tensor) for key, item in content}
    if kind in ("list", "tuple"):
        items = [join(item, tensor) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
