"""Draw the curves of a cascade.

Shape suffixes: P points, the trained model and the stages.
"""

import io

import numpy as np

from saltern.pipeline.metrics.sanity.verdict import HALF, Curves

_CURVES = {
    "absolute": ("rank correlation of absolute maps", "#1f6fb4"),
    "spearman": ("rank correlation", "#2a9d5c"),
    "ssim": ("SSIM", "#d95f02"),
}
_LABELS = 24  # names of layers that fit


def plot(curves: Curves, title: str) -> bytes:
    """Return a PNG of the similarities of the maps over the stages, with 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the import takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    at_P = np.arange(len(curves.layers) + 1)
    for name, (label, colour) in _CURVES.items():
        if name == "spearman" and not curves.signed:
            continue  # the same curve as that of absolute maps
        found = curves.stages(name)
        value_P, around_P = (
            np.array([first, *(getattr(one, part) for one in found)])
            for first, part in ((1, "value"), (0, "plus_minus"))
        )
        panel.plot(at_P, value_P, "o-", color=colour, label=label, markersize=4, linewidth=1.5)
        panel.fill_between(at_P, value_P - around_P, value_P + around_P, color=colour, alpha=0.15, linewidth=0)
    panel.axhline(HALF, color="#888888", linewidth=1, linestyle="--")
    panel.axhline(0, color="#888888", linewidth=0.5)
    every = -(-len(at_P) // _LABELS)
    panel.set_xticks(at_P[::every], ["trained", *curves.layers][::every], rotation=60, ha="right", fontsize=8)
    panel.set_xlabel("layers that are random: those up to")
    panel.set_ylabel("similarity to the map of the trained model")
    panel.set_title(f"{title}: {curves.verdict()}, area {curves.figure('area')}, {curves.images} images", fontsize=10)
    panel.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
