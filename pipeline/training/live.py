"""Rows of a training's current networks, as `extract` would store them."""

import math
from collections.abc import Sequence

import numpy as np
import torch

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
    """Makes rows with a method that has no target and runs the networks of a training.

    Args:
        method: whose calls change nothing about the next steps of the training.
        device: of the networks.
        preprocess: of the pixels in the batches.
        rule: makes the masks.
        class_numbers: the model's numbers of the classes in play, in the order of the logits.
    """

    def __init__(
        self, method: Method, device: torch.device, preprocess: Preprocess, rule: str, class_numbers: Sequence[int]
    ) -> None:
        self._layout = Layout(method.default_map_dtype, preprocess.shape)
        target, map_dtype = Target.parse("label", 1), self._layout.map_dtype
        self._explain = Explainer(method, device, preprocess, target=target, rule=Rule.parse(rule), map_dtype=map_dtype)
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
