"""Rows of CASM's current networks, as `extract` would store them.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""

from collections.abc import Sequence

from torch import Tensor

from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.methods import Method
from saltern.pipeline.training.live import LiveRows
from saltern.schemas.config import Preprocess


class LiveMasks(LiveRows):
    """Makes rows with the networks of a training, with the defaults of `extract --method casm`.

    Args:
        training: whose networks are used; this changes nothing about its next steps.
        preprocess: of the pixels in the batches.
        class_numbers: the model's numbers of the classes in play, in the order of the logits.
    """

    def __init__(self, training: Training, preprocess: Preprocess, class_numbers: Sequence[int]) -> None:
        super().__init__(_Live(training), training.device, preprocess, "mean:1", class_numbers)


class _Live(Method):
    """The masks of a training as a method's maps."""

    needs_target = False
    default_map_dtype = "uint8"

    def __init__(self, training: Training) -> None:
        super().__init__(training.classifier)
        self._training = training

    def compute(self, x_BCHW: Tensor, target_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_BK, mask_B1hw = self._training.predict(x_BCHW)
        return mask_B1hw[:, 0], logits_BK, None
