"""This process on this machine: cores, device, memory, signals, repeatable arithmetic."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from saltern.schemas.errors import UserError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def torch_threads(device: str, workers: int) -> int:
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, cores() // workers) if device == "cpu" else 1


def see_own_modules() -> None:
    """Make a user's own `package.module:factory` in the current folder one that can be imported."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def pick_device(device: str) -> str:
    """`auto` as cpu or cuda, whichever this machine has. Raises UserError for cuda without one."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("--device cuda, but no CUDA device is visible; --device cpu runs without one")
    return "cuda" if there and device != "cpu" else "cpu"


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Schedulers end jobs with SIGTERM: it is answered as Ctrl-C is."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def available_memory() -> int | None:
    """Bytes that this process may still take, by the machine and its control group; None where neither says."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None


_HELD = 2**31 - 1  # bytes that may lie free at the heap's end


# For a process that is yet to start. One heap alone: glibc trims all but the first, which brings the giving back again.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_HELD)}


_MALLOPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, _HELD)}


def keep_memory() -> None:
    """The same for this process, before it starts threads. Does nothing where the C library is another."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOPT.values():
            mallopt(parameter, value)


@contextlib.contextmanager
def exact(threads: int | None = None) -> Iterator[None]:
    """What repeats to the bit, where there is a choice; the settings are put back on the way out.

    Args:
        threads: of torch, which decide the order of sums on a CPU; None: as they are.
    """
    import torch

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
