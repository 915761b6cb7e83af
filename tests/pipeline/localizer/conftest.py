"""Fixtures of the localizer's tests. Trainings have one torch thread, as results depend on it."""

from collections.abc import Iterator
from pathlib import Path

import localizer_toys
import pytest
import torch
from casm_toys import quiet
from ranked import forking, in_ranks  # noqa: F401  (fixtures)

from saltern.pipeline.localizer.train import train

torch.set_num_threads(1)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Return the run to learn from: 16 samples in 2 shards. Tests must not change it."""
    folder = tmp_path_factory.mktemp("localizer")
    return localizer_toys.extract(localizer_toys.write_shards(folder / "shards", 2, 8), folder / "run")


@pytest.fixture(scope="session")
def val(tmp_path_factory) -> Path:
    """Return a run of the same method over another shard. Tests must not change it."""
    folder = tmp_path_factory.mktemp("held-out")
    return localizer_toys.extract(localizer_toys.write_shards(folder / "shards", 1, 5, first=50), folder / "run")


@pytest.fixture(scope="session")
def undisturbed(run, val, tmp_path_factory) -> Path:
    """Return the folder of a training without interruption. Tests must not change it."""
    out = tmp_path_factory.mktemp("localizer") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        train(localizer_toys.request(run, out, val=str(val)), quiet)
    return out
