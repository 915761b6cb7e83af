"""Peak memory of one call on the device."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that torch's allocator held at the most while `work` ran, above what it held before.

    Runs it twice, so that what stays cached is cached. On a CPU the allocations are traced by torch's profiler; what
    other libraries take for themselves does not show.
    """
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        work()
    events = [event for event in traced.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak: int = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return peak
