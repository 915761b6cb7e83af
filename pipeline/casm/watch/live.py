"""Rows of a training's current networks, as `extract` would store them.

Shape suffixes: B batch, C H W the network's input, K classes, h w the decoder's grid.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.extract.batch import Batch
from saltern.pipeline.extract.explain import Explainer
from saltern.pipeline.extract.extraction import Storage
from saltern.pipeline.methods import Method
from saltern.pipeline.runs.reader import Layout, Row
from saltern.schemas.config import Preprocess
from saltern.schemas.rules import Rule, Target
from saltern.schemas.run import Shard
from saltern.schemas.saliency import table_schema


class LiveRows:
    """Makes rows with the networks of a training, with the defaults of `extract --method casm`.

    Args:
        training: whose networks are used; this changes nothing about its next steps.
        preprocess: of the pixels in the batches.
        class_numbers: the model's numbers of the classes in play, in the order of the logits.
    """

    def __init__(self, training: Training, preprocess: Preprocess, class_numbers: Sequence[int]) -> None:
        target, rule = Target.parse("label", 1), Rule.parse("mean:1")
        self._layout = Layout(_Live.default_map_dtype, (preprocess.crop, preprocess.crop))
        self._explain = Explainer(
            _Live(training), training.device, preprocess, target=target, rule=rule, map_dtype=self._layout.map_dtype
        )
        self._class_numbers = np.asarray(class_numbers)

    def __call__(self, shard: Shard, batch: Batch) -> list[Row]:
        """Return a row for each sample of the batch."""
        explained, grid = None, None
        if batch.pixels_DHWC is not None:
            label_D = torch.zeros(len(batch.decoded), dtype=torch.long)  # not used: masks have no target
            explained = self._explain(batch.pixels_DHWC, label_D).wait()[0]
            columns = explained.columns
            columns["predicted"], grid = self._class_numbers[columns["predicted"]], columns["map"].shape[1:]
        schema = table_schema(None if grid is None else math.prod(grid))
        rows = Storage(grid, True, self._layout.input_shape).rows(schema)(shard, batch, explained)
        return [Row.from_record(self._layout, record) for record in rows.to_pylist()]


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
