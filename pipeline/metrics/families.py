"""The families of metrics by name, and the choice of metrics by the user."""

from collections.abc import Sequence

from saltern.pipeline.metrics.faithfulness.families import (
    CompositeFamily,
    ConfidenceFamily,
    NetworkFamily,
    PerturbationFamily,
    RoadFamily,
)
from saltern.pipeline.metrics.faithfulness.maps import StatisticsFamily
from saltern.pipeline.metrics.faithfulness.masked_family import MaskedFamily
from saltern.pipeline.metrics.family import Family
from saltern.pipeline.metrics.judge import Localization
from saltern.pipeline.metrics.max_box import MaxBox
from saltern.pipeline.metrics.segmentation import Pixels
from saltern.schemas.errors import UserError
from saltern.schemas.metrics import METRICS

_ALL: tuple[type[Family], ...] = (
    Localization,
    MaxBox,
    Pixels,
    StatisticsFamily,
    PerturbationFamily,
    ConfidenceFamily,
    RoadFamily,
    CompositeFamily,
    MaskedFamily,
)
FAMILIES: dict[str, type[Family]] = {family.name: family for family in _ALL}
_BESIDE = ("total_variation", "entropy")  # metrics in each table of faithfulness
DEFAULT = ("localization", "statistics")  # families that are quick: no forward passes, no boxes at every threshold


def choose_metrics(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the chosen metrics of each family. Metrics of faithfulness come with total variation and entropy.

    Args:
        words: names of metrics and of families, commas allowed; none = the families of DEFAULT.

    Raises:
        UserError: an unknown or an empty name.
    """
    names = [word.strip().lower() for text in words for word in text.split(",")] or [*DEFAULT]
    if "" in names:
        raise UserError(f"--metric {','.join(words)!r}: a name is empty; give names with one comma between them")
    known = [*FAMILIES, *(option_name(metric) for family in FAMILIES.values() for metric in family.metrics)]
    for name in names:
        if name not in known:
            raise UserError(f"--metric {name!r} is not one of {', '.join(known)}")
    chosen = {
        name: [metric for metric in family.metrics if name in names or option_name(metric) in names]
        for name, family in FAMILIES.items()
    }
    if any(chosen[name] for name, family in FAMILIES.items() if issubclass(family, NetworkFamily)):
        # Blur and noise shift faithfulness, so its tables show how smooth the maps are.
        statistics = StatisticsFamily.name
        chosen[statistics] = [name for name in METRICS[statistics] if name in (*chosen[statistics], *_BESIDE)]
    return {family: metrics for family, metrics in chosen.items() if metrics}


def option_name(metric: str) -> str:
    """Return a metric as the command line names it."""
    return metric.replace("_", "-")
