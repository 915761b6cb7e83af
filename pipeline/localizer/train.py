"""Train a localizer."""

from collections.abc import Callable
from pathlib import Path

from saltern.pipeline.localizer.plan import TrainRequest, make_plan
from saltern.pipeline.training import train as generic
from saltern.pipeline.training.train import print_to_stderr

__all__ = ["TrainRequest", "train"]


def train(request: TrainRequest, say: Callable[[str], None] = print_to_stderr) -> Path:
    """Train, or resume a training, as `training.train.train` does, and return its last checkpoint."""
    return generic.train(request, make_plan, say)
