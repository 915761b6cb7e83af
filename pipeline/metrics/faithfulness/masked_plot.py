"""Plot what each classifier recognises of masked images, the run's masks against the controls'."""

import io
from collections.abc import Mapping

from saltern.pipeline.metrics.estimate import Estimate
from saltern.schemas.evaluation import FOUND

_PANELS = {
    "masked_in": "masked in (more is better)",
    "masked_out": "masked out (less is better)",
    "inpainted": "inpainted (less is better)",
}
_BLUE, _GREY = "#0072b2", "#777777"
_MARKERS = ("o", "s", "^", "v", "D", "x")


def draw_masked(found: Mapping[str, Mapping[str, Estimate]]) -> bytes | None:
    """Return a PNG: a panel for each kind of image, a column for each classifier, a mark for each subject.

    Args:
        found: estimates by subject and metric, those of a classifier as `masked_in@MODEL`, and of the whole images.

    Returns:
        None if no sample has a label and a mask.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # the import takes a second
    from matplotlib.figure import Figure

    own = found.get(FOUND, {})
    names = [key.partition("@")[2] for key, estimate in own.items() if key.startswith("whole@") and estimate.count]
    if not names:
        return None
    figure = Figure(figsize=(7 + 2.4 * len(names), 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for panel, (column, title) in zip(panels, _PANELS.items(), strict=True):
        whole = [100 * own[f"whole@{name}"].value for name in names]
        panel.plot(range(len(names)), whole, "_", color="black", markersize=30, label="whole image, no mask")
        for number, (subject, estimates) in enumerate(found.items()):
            there = [estimates[f"{column}@{name}"] for name in names if f"{column}@{name}" in estimates]
            if len(there) < len(names):
                continue
            shift = 0.1 * (number - (len(found) - 1) / 2)
            ends = [[100 * (one.value - one.low) for one in there], [100 * (one.high - one.value) for one in there]]
            is_run = subject == FOUND
            panel.errorbar(
                [at + shift for at in range(len(names))],
                [100 * one.value for one in there],
                [[max(end, 0) for end in side] for side in ends],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=_BLUE if is_run else _GREY,
                markersize=8 if is_run else 5,
                capsize=2,
                label="the run's masks" if is_run else f"control: {subject}",
            )
        panel.set_title(title, fontsize="medium")
        panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.set_ylim(-3, 103)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("top-1, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
