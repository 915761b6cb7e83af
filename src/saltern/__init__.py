"""Saltern: saliency maps, masks and boxes of whole image datasets.

The names below are imported on first use, so that `import saltern` alone loads neither torch nor pyarrow.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saltern.pipeline.methods import build as build
    from saltern.pipeline.runs.dataset import SaliencyDataset as SaliencyDataset
    from saltern.pipeline.runs.reader import open_run as open_run

_HOMES = {
    "SaliencyDataset": "saltern.pipeline.runs.dataset",
    "build": "saltern.pipeline.methods",
    "open_run": "saltern.pipeline.runs.reader",
}
__all__ = ["SaliencyDataset", "__version__", "build", "open_run"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("saltern")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'saltern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
