"""Saltern harvests saliency maps, masks and boxes from whole image datasets.

The functions and classes below are imported on first use, so `import saltern` loads neither torch nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saltern.pipeline.extract.extraction import extract as extract
    from saltern.pipeline.methods import build as build
    from saltern.pipeline.runs.dataset import SaliencyDataset as SaliencyDataset
    from saltern.pipeline.runs.reader import open_run as open_run

__all__ = ["SaliencyDataset", "__version__", "build", "extract", "open_run"]
__version__ = "0.2.0"  # pyproject.toml reads it from here

_HOMES = {
    "SaliencyDataset": "saltern.pipeline.runs.dataset",
    "build": "saltern.pipeline.methods",
    "extract": "saltern.pipeline.extract.extraction",
    "open_run": "saltern.pipeline.runs.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saltern' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
