"""Figures with their goals, how two sides are compared, and the report that they make."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from saltern import __version__


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    value: float  # nan where skipped
    goal: float
    unit: str  # of value and goal: x, s, MB, ...
    at_least: bool  # whether larger is better
    note: str  # what was divided by what, with absolute values; where it was skipped, the reason
    miss: str = ""  # where it misses its goal, why
    rounds: dict[str, list[float]] = field(default_factory=dict)  # of each side, what was measured

    @property
    def skipped(self) -> bool:
        return math.isnan(self.value)

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def gap(self) -> float:
        """Of the goal, as a share of it; negative where it is missed."""
        return (self.value / self.goal - 1) * (1 if self.at_least else -1)

    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        return f"met, {self.gap:+.1%}" if self.met else f"MISSED, {self.gap:+.1%}"


def skipped(name: str, goal: float, unit: str, at_least: bool, reason: str) -> Figure:
    return Figure(name, math.nan, goal, unit, at_least, reason)


@dataclass
class Side:
    """One side of a ratio: does a piece of work each time it is called, and keeps its core time."""

    work: Callable[[], int]  # returns the images done
    cpu_s: Callable[[], float] = time.process_time  # core seconds so far, of whatever takes part
    core_ms: list[float] = field(default_factory=list)  # an image, of each call

    def __call__(self) -> float:
        """Images a second."""
        cpu, since = self.cpu_s(), time.perf_counter()
        images = self.work()
        seconds = time.perf_counter() - since
        self.core_ms.append(1000 * (self.cpu_s() - cpu) / images)
        return images / seconds

    @property
    def cost(self) -> float:
        """Core milliseconds an image, the median."""
        return statistics.median(self.core_ms)


def by_turns(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Every side's values, a round each; every second round in reverse order, so that a drift hits all alike."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            found[index].append(sides[index]())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(above) / statistics.median(below)


def describe_machine() -> dict[str, Any]:
    """The machine, versions and the load that others put on it."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": list(os.getloadavg()),
        "versions": {"saltern": __version__}
        | {name: _version(name) for name in ("torch", "torchvision", "ray", "pyarrow", "pillow")},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def as_json(figures: Sequence[Figure], settings: dict[str, Any], machine: dict[str, Any]) -> str:
    rows = [
        {**asdict(figure), "value": None if figure.skipped else figure.value, "verdict": figure.verdict()}
        for figure in figures
    ]
    return json.dumps({"machine": machine, "settings": settings, "figures": rows}, indent=1)


def as_markdown(figures: Sequence[Figure], machine: dict[str, Any]) -> str:
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    names = machine["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    lines = [
        f"{where}; torch {names['torch']}, ray {names['ray'] or 'absent'}; {machine['date']}; load at the start {load}",
        "",
        "| what | value | goal | | how, and why where it misses |",
        "|---|---|---|---|---|",
    ]
    for figure in figures:
        value = "-" if figure.skipped else f"{figure.value:.4g} {figure.unit}"
        goal = f"{'>=' if figure.at_least else '<='} {figure.goal:g} {figure.unit}"
        missed = "" if figure.skipped or figure.met else f" **{figure.miss}**"
        lines.append(f"| {figure.name} | {value} | {goal} | {figure.verdict()} | {figure.note}{missed} |")
    return "\n".join(lines) + "\n"


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
