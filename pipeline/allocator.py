"""The C allocator, told to keep the memory that it has.

By default glibc gives each large buffer back to the system when it is freed: a network's activations are then faulted
in anew by every layer of every batch, a third of a CPU's time. One heap that never shrinks has them ready.
"""

import contextlib
import ctypes

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
