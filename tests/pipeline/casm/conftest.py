"""Settings of the trainings: one torch thread here and in started processes, as the results depend on it."""

from collections.abc import Iterator

import pytest
import torch
from staged import batches, staged  # noqa: F401  (fixtures)

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
