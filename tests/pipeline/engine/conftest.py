"""Fixtures of the engine's tests."""

from collections.abc import Iterator

import pytest
from forked import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Start the process that forks runs."""
    made = Forks(tmp_path_factory.mktemp("log") / "log")
    yield made
    made.close()
