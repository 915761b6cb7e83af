"""Draw the picture of a training, ROOT/curves.png, from log.jsonl and validation.jsonl.

Shape suffixes: N steps that are drawn.
"""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saltern.pipeline.storage.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 4000  # lines that are read of a long log, evenly spread over it
_LINE = 1024  # bytes; longer than any line of a log
_WINDOWS = 40  # smoothing windows over the whole length
Numbers = NDArray[np.float64]

_BLUE, _ORANGE, _GREEN = "#1f6fb4", "#d95f02", "#2a9d5c"
# title, unit -> column of log.jsonl -> label, colour
_PANELS = {
    ("classifier", "cross-entropy, nats"): {
        "clean_loss": ("images", _BLUE), "masked_loss": ("masked images", _ORANGE),
    },
    ("mask network", "loss"): {
        "mask_loss": ("all", _BLUE), "score_term": ("score", _ORANGE), "size_term": ("size", _GREEN),
    },
    ("mask", "share of the image"): {"mask_mean": ("mean, ± one deviation over images", _BLUE)},
    ("images", "share"): {
        "right": ("known to the classifier", _BLUE), "confused": ("confused by the mask", _ORANGE),
    },
    ("weight of the size term", "lambda"): {"lambda": ("lambda", _BLUE)},
}  # fmt: skip
# Fixed, as a layout that is computed from the texts takes longer than the drawing. Shares of the figure, or of a panel.
_MARGINS = {"left": 0.08, "right": 0.99, "bottom": 0.05, "top": 0.97, "wspace": 0.19, "hspace": 0.15}
_LABEL = -0.13  # x of the units
_VALIDATION = {"le": ("LE (less is better)", _ORANGE), "f1": ("F1", _BLUE), "top1": ("top-1", _GREEN)}


def draw(root: Path) -> None:
    """Write ROOT/curves.png; panels without data are blank. The time does not grow with the length of the log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the import takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    steps, validations = read(root / "log.jsonl", POINTS), read(root / "validation.jsonl", POINTS)
    figure = Figure(figsize=(12, 10), dpi=100)
    FigureCanvasAgg(figure)
    _, _, mask, images, weight, last = panels = list(figure.subplots(3, 2, sharex=True, gridspec_kw=_MARGINS).flat)
    number_N = _column(steps, "step")
    for panel, (title, curves) in zip(panels, [*_PANELS.items(), (("validation", "%"), _VALIDATION)], strict=True):
        for key, (label, colour) in curves.items():
            if panel is last:
                panel.plot(*_points(validations, key), "o-", color=colour, label=label, markersize=4, linewidth=1.5)
            else:
                _curve(panel, number_N, _column(steps, key), label, colour)
        _decorate(panel, *title)
    mean_N, std_N = (_smooth(_column(steps, key)) for key in ("mask_mean", "mask_std"))
    mask.fill_between(number_N, mean_N - std_N, mean_N + std_N, color=_BLUE, alpha=0.15, linewidth=0)
    for panel in (mask, images):
        panel.set_ylim(-0.03, 1.03)
    if any(line.get("lambda", 0) > 0 for line in steps):
        weight.set_yscale("log")
        weight.yaxis.set_major_formatter(LogFormatter())
        weight.yaxis.set_minor_formatter(LogFormatter())
    for panel in (weight, last):
        panel.set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write(root / "curves.png", picture.getvalue())


def read(path: Path, points: int | None = None) -> list[dict[str, float]]:
    """Return the complete lines of a log, in order, with NaN for null; [] if the file does not exist.

    Args:
        points: read at most this many lines, evenly spread over the file; None: all.
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
    return [line for line in map(_parse, lines) if line is not None]


def _parse(raw: bytes) -> dict[str, float] | None:
    """Return the numbers of a line; None if the line is cut off."""
    try:
        line: dict[str, Any] = json.loads(raw)
        return {key: math.nan if value is None else value for key, value in line.items()}
    except (ValueError, AttributeError):
        return None


def _curve(panel: "Axes", number_N: Numbers, value_N: Numbers, label: str, colour: str) -> None:
    """Plot the running mean of a column, and faintly the column itself."""
    if len(value_N) >= 2 * _WINDOWS:
        panel.plot(number_N, value_N, color=colour, alpha=0.2, linewidth=0.6)
    panel.plot(number_N, _smooth(value_N), color=colour, label=label, linewidth=1.6)


def _points(lines: list[dict[str, float]], key: str) -> tuple[Numbers, Numbers]:
    lines = [line for line in lines if key in line]
    return _column(lines, "step"), _column(lines, key)


def _decorate(panel: "Axes", title: str, unit: str) -> None:
    panel.set_title(title, loc="left", y=1, fontsize=11, fontweight="bold")
    panel.set_ylabel(unit)
    panel.yaxis.set_label_coords(_LABEL, 0.5)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    # Above the panel, where it hides no data.
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.1, fontsize=9)


def _column(lines: list[dict[str, float]], key: str) -> Numbers:
    return np.array([line.get(key, math.nan) for line in lines], float)


def _smooth(value_N: Numbers) -> Numbers:
    """Return the centred running mean of the finite values, over a fortieth of the length; shorter at both ends."""
    window = np.ones(2 * (len(value_N) // (2 * _WINDOWS)) + 1)
    if len(window) == 1:
        return value_N
    finite_N = np.isfinite(value_N)
    sums_N, counts_N = (np.convolve(part, window, "same") for part in (np.where(finite_N, value_N, 0.0), finite_N))
    smooth: Numbers = np.where(counts_N > 0, sums_N / counts_N.clip(1), math.nan)
    return smooth
