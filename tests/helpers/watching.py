"""Networks, given as `watching:factory`, that note the arithmetic of this process while they run."""

import threading

import torch
from casm_toys import Small
from making import Tiny
from torch import Tensor, nn

# TF32 of convolutions, determinism, on the thread of a processor's device, in training mode
Note = tuple[bool, bool, bool, bool]
NOTES: list[Note] = []


def _note(model: nn.Module, *_: Tensor) -> None:
    on_device = threading.current_thread().name.startswith("saltern-device")
    NOTES.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, on_device, model.training))


def _watched(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(_note)
    return model.eval()


def tiny() -> nn.Module:
    """Return the network of `making:tiny`."""
    return _watched(Tiny())


def small() -> nn.Module:
    """Return the network of `casm_toys:small`, with other weights."""
    return _watched(Small())
