"""No metric waits for the device in its loops, and all repeat to the bit on a GPU."""

from collections.abc import Callable

import pytest
import torch
from naive_faithfulness import batch, network
from operations import RAISING, operations

from saltern.pipeline.metrics.controls import CONTROLS, control
from saltern.pipeline.metrics.faithfulness.composite import coherency
from saltern.pipeline.metrics.faithfulness.confidence import average_drop, densities
from saltern.pipeline.metrics.faithfulness.curves import deletion, insertion
from saltern.pipeline.metrics.faithfulness.masked import masked_classification
from saltern.pipeline.metrics.faithfulness.road import road
from saltern.pipeline.metrics.faithfulness.statistics import map_statistics

# Operations whose result the host needs before it can go on.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
MODEL, BLACK, SEEDS = network(), torch.zeros(3, 1, 1), torch.arange(3)
BATCH = X, MAPS, TARGETS = batch()
PIXELS = torch.zeros(3, 12, 12, 3, dtype=torch.uint8)
RUNS: dict[str, Callable[[], object]] = {
    "deletion": lambda: deletion(MODEL, *BATCH, steps=4, batch=5, baseline="blur"),
    "insertion": lambda: insertion(MODEL, *BATCH, steps=4, batch=5),
    "average drop": lambda: average_drop(MODEL, *BATCH, BLACK),
    "densities": lambda: densities(MODEL, *BATCH, BLACK),
    "road": lambda: road(MODEL, *BATCH, SEEDS, batch=5),
    "coherency": lambda: coherency(lambda x_BCHW, _: x_BCHW[:, 0], *BATCH, BLACK),
    "masked classification": lambda: masked_classification(MODEL, X, X, MAPS > 1, TARGETS, BLACK),
    "statistics": lambda: map_statistics(MAPS),
    "controls": lambda: [control(name, PIXELS, SEEDS) for name in CONTROLS],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_operation_waits_or_differs_between_runs(name: str) -> None:
    seen = operations(RUNS[name])
    assert not seen & (WAITING | RAISING)
    assert seen & {"argsort", "sort", "convolution", "diff", "sub", "full", "ones"}, "the operations are seen"
