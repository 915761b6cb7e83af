"""Trainings of this process and of those that tests start have one thread: their bits depend on it."""

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
