"""Fixtures of CASM's tests. Trainings have one torch thread, here and in started processes, as results depend on it."""

from collections.abc import Iterator
from pathlib import Path

import casm_toys
import pytest
import torch
from ranked import forking, in_ranks  # noqa: F401  (fixtures)
from staged import batches, staged  # noqa: F401  (fixtures)

from saltern.pipeline.casm.training.train import train
from saltern.pipeline.casm.watch import curves

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Draw no curves, which takes a second each time."""
    monkeypatch.setattr(curves, "draw", lambda root: None)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return casm_toys.write_shards(tmp_path_factory.mktemp("casm") / "shards")


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory) -> Path:
    """Return the folder of a training without interruption. Tests must not change it."""
    out = tmp_path_factory.mktemp("casm") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        train(casm_toys.request(shards, out), casm_toys.quiet)
    return out
