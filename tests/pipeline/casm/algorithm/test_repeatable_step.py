"""A training step and its masks use no operation that does not repeat to the bit on a GPU."""

import casm_toys
import pytest
import torch
from operations import RAISING, operations

from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training

REPLACED = {"upsample_bilinear2d_backward"}  # by torch itself, on a GPU, with another operation


@pytest.mark.parametrize("loss", ["sequential", "sum"])
def test_steps_and_masks_repeat(loss: str) -> None:
    hyperparameters = Hyperparameters(thinning=casm_toys.OFTEN, lam="auto", pool_size=2, classifier_loss=loss)
    training = Training(casm_toys.small(), hyperparameters)
    x_BCHW, label_B = torch.randn(4, 3, 64, 64), torch.arange(4)
    seen = operations(lambda: [training.step(x_BCHW, label_B) for _ in range(4)])
    assert {"convolution_backward", "nll_loss_backward"} <= seen
    assert seen & RAISING <= REPLACED
    assert not operations(lambda: training.predict(x_BCHW)) & RAISING
