"""Figures and their goals, the timing of two sides by turns, and the report."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from saltern import __version__
from saltern.pipeline.machine import cores
from saltern.pipeline.tables import markdown_table

_ENOUGH_S = 1.0  # of one round of one side; faster calls are repeated


@dataclass(frozen=True)
class Figure:
    """A measured value and its goal: one row of the report."""

    name: str
    value: float | None  # None: not measured
    goal: float
    unit: str  # of value and goal: x, s, MB, ...
    at_least: bool  # True: larger is better
    note: str  # the two absolute values of the ratio; or the reason why it was not measured
    miss: str = ""  # why the goal is missed
    rounds: dict[str, list[float]] = field(default_factory=dict)  # each side's measurements

    def verdict(self) -> str:
        """Return whether the goal is met, and the margin as a share of the goal."""
        if self.value is None:
            return "skipped"
        gap = (self.value / self.goal - 1) * (1 if self.at_least else -1)
        return f"{'met' if gap >= 0 else 'MISSED'}, {gap:+.1%}"


def as_json(figures: Sequence[Figure], settings: dict[str, Any], machine: dict[str, Any]) -> str:
    """Return the report as JSON, every round included."""
    rows = [asdict(figure) | {"verdict": figure.verdict()} for figure in figures]
    return json.dumps({"machine": machine, "settings": settings, "figures": rows}, indent=1)


def as_markdown(figures: Sequence[Figure], machine: dict[str, Any]) -> str:
    """Return the report as a Markdown table below a line about the machine."""
    rows = []
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        goal = f"{'>=' if figure.at_least else '<='} {figure.goal:g} {figure.unit}"
        miss = f" **{figure.miss}**" if figure.verdict().startswith("MISSED") else ""
        rows.append([figure.name, value, goal, figure.verdict(), figure.note + miss])
    return f"{machine_line(machine)}\n\n{markdown_table(['what', 'value', 'goal', '', 'how measured'], rows)}\n"


def describe_machine() -> dict[str, Any]:
    """Return the machine, the versions and the load that other processes put on it."""
    found = {package.name.lower(): package.version for package in distributions()}
    names = ("torch", "torchvision", "ray", "pyarrow", "pillow")
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": list(os.getloadavg()),
        "versions": {"saltern": __version__} | {name: found.get(name) for name in names},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine_line(machine: dict[str, Any]) -> str:
    """Return the result of `describe_machine` as one line."""
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    packages = ", ".join(f"{name} {machine['versions'][name] or 'absent'}" for name in ("torch", "ray"))
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    return f"{where}; {packages}; {machine['date']}; load at the start {load}"


@dataclass
class Side:
    """One side of a ratio: work that is timed once a round."""

    work: Callable[[], int]  # returns the images done
    cpu_s: Callable[[], float] = time.process_time  # core seconds used so far by everything that takes part
    core_ms: list[float] = field(default_factory=list)  # an image, one a round

    def __call__(self) -> float:
        """Do the work. Returns images/s."""
        cpu, since = self.cpu_s(), time.perf_counter()
        images = self.work()
        seconds = time.perf_counter() - since
        self.core_ms.append(1000 * (self.cpu_s() - cpu) / images)
        return images / seconds

    @property
    def cost(self) -> float:
        """Core milliseconds an image, the median of the rounds."""
        return statistics.median(self.core_ms)


def by_turns(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Return each side's values, one a round. Every second round runs in reverse, so that a drift hits all sides."""
    values: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            values[index].append(sides[index]())
    return values


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the ratio of the medians."""
    return statistics.median(above) / statistics.median(below)


@dataclass(frozen=True)
class Comparison:
    """Calls on one batch, timed by turns. Each field has a value for each call, by its name."""

    ms: dict[str, float]  # an image, the median of the rounds
    core_ms: dict[str, float]  # likewise
    rounds: dict[str, list[float]]  # ms an image


def compare(calls: Mapping[str, Callable[[], object]], images: int, device: str, rounds: int) -> Comparison:
    """Time calls that each work on `images` images. Calls of one round follow each other without a wait."""
    sides = {name: _repeated(call, images, device) for name, call in calls.items()}
    values = by_turns(rounds, *sides.values())
    ms = {name: [1000 / rate for rate in rates] for name, rates in zip(sides, values, strict=True)}
    medians = {name: statistics.median(values) for name, values in ms.items()}
    return Comparison(medians, {name: side.cost for name, side in sides.items()}, ms)


def _repeated(call: Callable[[], object], images: int, device: str) -> Side:
    def run(repeats: int) -> int:
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return repeats * images

    run(1)  # warm up
    repeats = max(1, round(_ENOUGH_S * Side(lambda: run(1))() / images))
    return Side(lambda: run(repeats))


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes that torch's allocator held while `work` ran, above what it held before.

    Runs `work` twice, so that caches are filled. On a CPU, torch's profiler traces the allocations; memory of other
    libraries does not count.
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
