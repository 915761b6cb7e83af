"""A picture of how a training went: ROOT/curves.png, from what stands in log.jsonl and validation.jsonl.

Shape suffixes: N steps that are drawn.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.storage.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 4000  # lines of a long log that are read, evenly spread over it
_LINE = 1024  # bytes that no line of a log exceeds
_WINDOWS = 40  # smoothing windows over the whole length
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class _Curve:
    key: str
    label: str
    colour: str


_BLUE, _ORANGE, _GREEN, _GREY = "#1f6fb4", "#d95f02", "#2a9d5c", "#70757a"
_PANELS: dict[tuple[str, str], Sequence[_Curve]] = {
    ("classifier", "cross-entropy, nats"): (
        _Curve("clean_loss", "images", _BLUE), _Curve("masked_loss", "masked images", _ORANGE),
    ),
    ("mask network", "loss"): (
        _Curve("mask_loss", "all", _BLUE), _Curve("score_term", "score", _ORANGE),
        _Curve("size_term", "size", _GREEN),
    ),
    ("mask", "share of the image"): (_Curve("mask_mean", "mean, ± one deviation over images", _BLUE),),
    ("images", "share"): (
        _Curve("right", "known to the classifier", _BLUE), _Curve("confused", "confused by the mask", _ORANGE),
    ),
    ("weight of the size term", "lambda"): (_Curve("lambda", "lambda", _BLUE),),
}  # fmt: skip
_JUDGED = (_Curve("le", "LE (less is better)", _ORANGE), _Curve("f1", "F1", _BLUE), _Curve("top1", "top-1", _GREEN))


def read(path: Path, points: int | None = None) -> list[dict[str, float]]:
    """The whole lines of a log, in order; null is NaN. None at all where there is no file.

    Args:
        points: read so many at most, evenly spread over the file, whatever its length; None: all.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = path.stat().st_size
        if points is None or size <= points * _LINE:
            raw = file.read().split(b"\n")[:-1]
            lines = raw if points is None else raw[:: -(-len(raw) // points) or 1]
        else:
            lines = []
            for start in range(0, size - _LINE, size // points):
                file.seek(start)
                lines += file.read(_LINE).split(b"\n")[1:2]
    return [line for line in map(_parsed, lines) if line is not None]


def _parsed(raw: bytes) -> dict[str, float] | None:
    """None for a line that was cut off."""
    try:
        found: dict[str, Any] = json.loads(raw)
        return {key: math.nan if value is None else value for key, value in found.items()}
    except (ValueError, AttributeError):
        return None


def draw(root: Path) -> None:
    """Write ROOT/curves.png; what is absent is left blank. The work does not grow with the length of the log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    steps, judged = read(root / "log.jsonl", POINTS), read(root / "validation.jsonl", POINTS)
    figure = Figure(figsize=(12, 10), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2, sharex=True).flat
    *panels, last = axes
    for axis, ((title, unit), curves) in zip(panels, _PANELS.items(), strict=True):
        _panel(axis, title, unit)
        for curve in curves:
            _trace(axis, steps, curve)
        _legend(axis)
    _spread(panels[2], steps)
    for axis in panels[2:4]:
        axis.set_ylim(-0.03, 1.03)
    if any(line.get("lambda", 0) > 0 for line in steps):
        panels[4].set_yscale("log")
        panels[4].yaxis.set_major_formatter(LogFormatter())
        panels[4].yaxis.set_minor_formatter(LogFormatter())
    _panel(last, "validation", "%")
    for curve in _JUDGED:
        of = [line for line in judged if curve.key in line]
        number, value = ([line[key] for line in of] for key in ("step", curve.key))
        last.plot(number, value, "o-", color=curve.colour, label=curve.label, markersize=4, linewidth=1.5)
    _legend(last)
    for axis in (panels[4], last):
        axis.set_xlabel("step")
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write(root / "curves.png", picture.getvalue())


def _panel(axis: "Axes", title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axis: "Axes") -> None:
    """Above the panel, where no data is."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.1, fontsize=9)


def _trace(axis: "Axes", steps: list[dict[str, float]], curve: _Curve) -> None:
    """Each step faintly, and their running mean."""
    number_N, value_N = _column(steps, "step"), _column(steps, curve.key)
    smooth_N = _smooth(value_N)
    if not np.array_equal(smooth_N, value_N, equal_nan=True):
        axis.plot(number_N, value_N, color=curve.colour, alpha=0.2, linewidth=0.6)
    axis.plot(number_N, smooth_N, color=curve.colour, label=curve.label, linewidth=1.6)


def _spread(axis: "Axes", steps: list[dict[str, float]]) -> None:
    mean_N, std_N = (_smooth(_column(steps, key)) for key in ("mask_mean", "mask_std"))
    axis.fill_between(_column(steps, "step"), mean_N - std_N, mean_N + std_N, color=_BLUE, alpha=0.15, linewidth=0)


def _column(lines: list[dict[str, float]], key: str) -> Numbers:
    return np.array([line.get(key, math.nan) for line in lines], float)


def _smooth(value_N: Numbers) -> Numbers:
    """Running mean, centred, over a fortieth of the length; shorter at the ends; over what is finite."""
    reach = len(value_N) // (2 * _WINDOWS)
    if reach == 0:
        return value_N
    at, there_N = np.arange(len(value_N)), np.isfinite(value_N)
    first, stop = (at - reach).clip(0), (at + reach + 1).clip(max=len(value_N))
    sums, counts = (np.concatenate([[0.0], part.cumsum()]) for part in (np.where(there_N, value_N, 0), there_N))
    counted = counts[stop] - counts[first]
    smooth: Numbers = np.where(counted > 0, (sums[stop] - sums[first]) / counted.clip(1), math.nan)
    return smooth
