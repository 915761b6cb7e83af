"""Figures and their goals, the timing of several sides by turns, and peak memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from saltern.pipeline.tables import markdown_table

_ENOUGH_S = {"cpu": 1.0, "cuda": 0.1}  # of one round of one side; faster calls are repeated
T = TypeVar("T")


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

    def entry(self) -> dict[str, Any]:
        """Return the figure for the JSON report."""
        return asdict(self) | {"verdict": self.verdict()}


def figures_table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    rows = []
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        goal = f"{'>=' if figure.at_least else '<='} {figure.goal:g} {figure.unit}"
        miss = f" **{figure.miss}**" if figure.verdict().startswith("MISSED") else ""
        rows.append([figure.name, value, goal, figure.verdict(), figure.note + miss])
    return markdown_table(["what", "value", "goal", "", "how measured"], rows)


def against_goal(value: float, goal: float | None, digits: int = 2) -> str:
    """Return a ratio and the goal that it may not exceed; a missed goal makes the ratio bold."""
    text = f"{value:.{digits}f}"
    if goal is None:
        return text
    return f"{text} (<= {goal})" if value <= goal else f"**{text}** (<= {goal})"


def by_turns(rounds: int, *sides: Callable[[], T]) -> list[list[T]]:
    """Return each side's values, one a round. Every second round runs in reverse, so that a drift hits all sides."""
    values: list[list[T]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            values[index].append(sides[index]())
    return values


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the ratio of the medians."""
    return statistics.median(above) / statistics.median(below)


class Times(NamedTuple):
    """Milliseconds an image of one call."""

    ms: float  # the median of the rounds
    core_ms: float  # on all cores together, likewise
    rounds: list[float]  # ms


def compare(calls: Mapping[str, Callable[[], object]], images: int, device: str, rounds: int) -> dict[str, Times]:
    """Time calls that each work on `images` images. Calls of one round follow each other without a wait."""
    values = by_turns(rounds, *(_repeated(call, images, device) for call in calls.values()))
    times = {}
    for name, pairs in zip(calls, values, strict=True):
        ms, core_ms = map(list, zip(*pairs, strict=True))
        times[name] = Times(statistics.median(ms), statistics.median(core_ms), ms)
    return times


def _repeated(call: Callable[[], object], images: int, device: str) -> Callable[[], tuple[float, float]]:
    """Return a measurement of the call: milliseconds and core milliseconds an image."""

    def measured(repeats: int) -> tuple[float, float]:
        cpu, since = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        each = 1000 / (repeats * images)
        return each * (time.perf_counter() - since), each * (time.process_time() - cpu)

    measured(1)  # warm up
    repeats = max(1, round(_ENOUGH_S[device] * 1000 / (measured(1)[0] * images)))
    return lambda: measured(repeats)


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
