"""This process and its machine: cores, device, signals, memory.

Linux has calls that macOS lacks (CPU affinity, /proc, control groups, glibc's mallopt); without them each function
falls back or does nothing.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from saltern.schemas import choices
from saltern.schemas.errors import UserError

# glibc's malloc keeps freed memory for the next batch, which saves most page faults. Use a single arena: glibc trims
# secondary arenas whatever M_TRIM_THRESHOLD says.
_KEPT = 2**31 - 1  # bytes that may stay free at the end of the heap
_MALLOPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, _KEPT)}
# The same settings for a process that is about to start.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # matrix products on a GPU repeat to the bit
}


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def torch_threads(device: str, workers: int) -> int:
    """Return torch's threads per worker: OMP_NUM_THREADS if set, else an equal share of the cores; 1 on a GPU."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, cores() // workers) if device == "cpu" else 1


def check_device(device: str) -> None:
    """Raise UserError if the device is none that every job supports."""
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: choose a GPU by CUDA_VISIBLE_DEVICES={device[5:]}, and give --device cuda")
    choices.check_choice("--device", device, choices.Device)


def pick_device(device: str) -> str:
    """Return cpu or cuda; `auto` is cuda if this machine has it. Raises UserError for any other or absent device."""
    import torch

    check_device(device)
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda, but no CUDA device is visible; --device cpu runs without one")
    return "cuda" if available and device != "cpu" else "cpu"


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, which schedulers send to end jobs. Works only in the main thread."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def available_memory() -> int | None:
    """Return the bytes that this process may still allocate; None if no limit can be read."""
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits)) if limits else None


def keep_memory() -> None:
    """Keep freed memory in this process, before it starts threads. Does nothing without glibc."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOPT.values():
            mallopt(parameter, value)


def process_identity(pid: int) -> list[str] | None:
    """Return what identifies a live process: the machine's boot, the namespace of its number, and its start.

    None if it has ended, or if this system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else [boot, os.readlink("/proc/self/ns/pid"), fields[18]]
    except OSError:
        return None
