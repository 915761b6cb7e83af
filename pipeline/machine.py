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
_KEPT, _KEPT_AT_LEAST = 2**31 - 1, 2**26  # bytes that may stay free at the end of the heap
_MALLOPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, _KEPT)}
# The same settings for a process that is about to start.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # matrix products on a GPU repeat to the bit
}

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_workers = 1  # of this machine, of which this process is one


def share(workers: int) -> None:
    """Share this machine's cores and memory with other workers: `workers` in all, this process included."""
    global _workers
    _workers = max(1, workers)


def cores() -> int:
    """Return the number of CPU cores that this process may use, by affinity and by the quotas of its control groups."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _group_folders("cpu"):
        quota = _numbers(folder / "cpu.max") or _numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
        if len(quota) == 2 and min(quota) > 0:
            count = min(count, quota[0] // quota[1])
    return max(1, count)


def decode_threads() -> int:
    """Return the usual number of threads that decode images in a worker on this machine."""
    return max(1, min(16, cores() // _workers))


def _group_folders(controller: str) -> list[Path]:
    """Return the folders of this process's control groups and of those above them, of cgroup 2 and of cgroup 1."""
    folders = [_GROUPS, _GROUPS / controller]  # a container may see its own groups here, under another name
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                own = (_GROUPS / controller if controllers else _GROUPS) / path.strip("/")
                folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(_GROUPS)]
    return list(dict.fromkeys(folders))


def _numbers(*files: Path) -> list[int]:
    """Return the whole numbers that the files hold; none if one is missing or holds another word, such as `max`."""
    try:
        return [int(word) for file in files for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


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


def signals_as_interrupts() -> None:
    """Raise KeyboardInterrupt on SIGTERM too, from now on. Call it in the main thread."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def exit_on_signals(code: int) -> None:
    """Let SIGINT and SIGTERM end this process at once with this code. Call it in the main thread, as the last step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))


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
    """Return the bytes that this process may still allocate; None if no limit can be read.

    A control group counts cached files as memory in use. Those that it gives back at once are counted as free.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    for folder in _group_folders("memory"):
        used = _numbers(folder / "memory.max", folder / "memory.current") or _numbers(
            folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes"
        )
        if len(used) == 2:
            limits.append(used[0] - used[1] + _cached(folder / "memory.stat"))
    return max(0, min(limits)) if limits else None


def _cached(stat: Path) -> int:
    """Return the bytes of cached files that were not used lately; cgroup 1 counts those of groups below as `total_`."""
    found = {"inactive_file": 0}
    with contextlib.suppress(OSError, ValueError):
        found |= {name: int(value) for name, value in (line.split() for line in stat.read_text().splitlines())}
    return found.get("total_inactive_file", found["inactive_file"])


def keep_memory() -> None:
    """Keep freed memory in this process, before it starts threads. Does nothing without glibc.

    That is at most a quarter of the worker's share of the memory that is free, but 64 MiB.
    """
    free = available_memory()
    kept = _KEPT if free is None else min(_KEPT, max(_KEPT_AT_LEAST, free // (4 * _workers)))
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in {**_MALLOPT, "M_TRIM_THRESHOLD": (-1, kept)}.values():
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
