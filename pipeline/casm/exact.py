"""How torch is set while a training runs, so that it can be repeated to the bit."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact(threads: int | None = None) -> Iterator[None]:
    """What repeats to the bit, where there is a choice; the settings are put back on the way out.

    Args:
        threads: of torch, which decide the order of sums on a CPU; None: as they are.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    tuned, before = torch.backends.cudnn.benchmark, torch.get_num_threads()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products on CUDA would not repeat
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = tuned
        torch.set_num_threads(before)
